"""Settings survive JSON, and an illegal one is refused in one line with the numbers."""

import dataclasses
import json
import types
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.config import (
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainConfig,
    TrainingConfig,
    differences,
    to_json,
    validated,
)
from jaxgpt.errors import BadFileError, ConfigError
from jaxgpt.files import parse_json

DEFAULT = TrainConfig()


def from_json(text: str, where: str = "configuration") -> TrainConfig:
    config: TrainConfig = validated(TrainConfig, parse_json(text.encode(errors="surrogateescape"), where), where)
    return config


def another(kind: Any, value: Any) -> Any:
    """A legal value other than the default, for any field."""
    if get_origin(kind) is Literal:
        return next(choice for choice in get_args(kind) if choice != value)
    if get_origin(kind) in (tuple, types.UnionType):
        first = get_args(kind)[0]
        other = another(first, None)
        return (other,) if get_origin(kind) is tuple else other
    match value:
        case bool():
            return not value
        case int():
            return max(2 * value, 2)
        case float():
            return value / 2 or 0.25
    return {int: 4, float: 1.5, str: "training.steps", bool: False}[kind]


def every_field() -> list[tuple[str, Any]]:
    """`section.field`, and a value that is not its default."""
    found: list[tuple[str, Any]] = []
    for section in dataclasses.fields(DEFAULT):
        part = getattr(DEFAULT, section.name)
        if not dataclasses.is_dataclass(part):
            found.append((section.name, another(section.type, part)))
            continue
        fields = dataclasses.fields(part)
        found += [(f"{section.name}.{f.name}", another(f.type, getattr(part, f.name))) for f in fields]
    alone_illegal = {"model.n_experts"}  # wants a gated network without biases
    return [(key, value) for key, value in found if key not in alone_illegal]


def changed(key: str, value: Any) -> TrainConfig:
    section, _, name = key.rpartition(".")
    if not section:
        return dataclasses.replace(DEFAULT, **{name: value})
    return dataclasses.replace(DEFAULT, **{section: dataclasses.replace(getattr(DEFAULT, section), **{name: value})})


@pytest.mark.parametrize(("key", "value"), every_field())
def test_every_setting_survives_json_and_is_seen_as_a_difference(key: str, value: Any) -> None:
    config = changed(key, value)
    again = from_json(to_json(config))
    assert again == config and hash(again) == hash(config)
    old = DEFAULT
    for name in key.split("."):
        old = getattr(old, name)
    assert old != value
    assert differences(DEFAULT, config) == {key: (old, value)}
    assert differences(config, again) == {}


@settings(deadline=None)
@given(
    st.floats(min_value=1e-30, max_value=1e308),
    st.lists(st.integers(0, 2**31 - 1)).map(tuple),
    st.text(),
    st.lists(st.text(min_size=1), min_size=1).map(tuple),
)
def test_any_number_and_any_text_survive_json(
    rate: float, windows: tuple[int, ...], text: str, paths: tuple[str, ...]
) -> None:
    config = TrainConfig(
        run_dir=text,
        model=ModelConfig(windows=windows),
        optimizer=OptimizerConfig(peak_lr=rate),
        data=DataConfig(paths=paths),
    )
    assert from_json(to_json(config)) == config


def test_missing_settings_take_their_defaults() -> None:
    assert from_json("{}") == DEFAULT
    assert from_json('{"model": {"n_layers": 3}}') == changed("model.n_layers", 3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"model": {"n_layer": 3}},
            "configuration: unknown key model.n_layer; did you mean n_layers or scan_layers or rotary_layers?",
        ),
        ({"optimiser": {}}, "configuration: unknown key optimiser; did you mean optimizer?"),
        ({"training": {"zzz": 1}}, "configuration: unknown key training.zzz"),
    ],
)
def test_an_unknown_key_names_its_neighbours(wrong: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_json(json.dumps(wrong))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ('{"model": {"n_layers": "many"}}', ["run.json: model.n_layers", "integer"]),
        ('{"model": {"n_layers": 2.5}}', ["run.json: model.n_layers", "integer"]),
        ('{"model": {"positions": "rotray"}}', ["run.json: model.positions", "rotary"]),
        ('{"model": 3}', ["run.json: model"]),
        ('{"model": {"n_heads": 7}}', ["model.d_model 768 does not divide by model.n_heads 7"]),
    ],
)
def test_an_illegal_value_in_json_is_refused_by_name(text: str, fragments: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        from_json(text, "run.json")
    message = str(caught.value)
    assert all(fragment in message for fragment in fragments) and "\n" not in message


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "null", "[" * 100_000, '{"name": "\udcff"', '{"model": NaN}'])
def test_what_is_not_a_json_object_is_a_bad_file(text: str) -> None:
    with pytest.raises(BadFileError, match=r"^run.json is not .*; restore the file$") as caught:
        from_json(text, "run.json")
    assert caught.value.exit_status == 65


INF, NAN = float("inf"), float("nan")
ILLEGAL: list[tuple[type, dict[str, Any], str]] = [
    (ModelConfig, dict(n_layers=0), "model.n_layers is 0"),
    (ModelConfig, dict(d_model=-1), "model.d_model is -1"),
    (ModelConfig, dict(d_model=100), "model.d_model 100 does not divide by model.n_heads 12"),
    (ModelConfig, dict(n_kv_heads=5), "model.n_heads 12 does not divide by model.n_kv_heads 5"),
    (ModelConfig, dict(n_kv_heads=0), "model.n_kv_heads is 0"),
    (ModelConfig, dict(head_dim=0), "model.head_dim is 0"),
    (ModelConfig, dict(d_ff=-3), "model.d_ff is -3"),
    (ModelConfig, dict(vocab_size=0), "model.vocab_size is 0"),
    (ModelConfig, dict(context_length=0), "model.context_length is 0"),
    (ModelConfig, dict(dropout=1.0), "model.dropout is 1.0: it must be between 0 and 0.999"),
    (ModelConfig, dict(dropout=NAN), "model.dropout is nan"),
    (ModelConfig, dict(norm_epsilon=-1e-5), "model.norm_epsilon is -1e-05"),
    (ModelConfig, dict(rope_theta=INF), "model.rope_theta is inf: it must be between 1 and 1e+30"),
    (ModelConfig, dict(head_dim=5, positions="rotary"), "model.head_dim 5 times model.rope_fraction 1.0 must be even"),
    (ModelConfig, dict(d_model=9, n_heads=3, positions="sinusoidal"), "model.d_model 9 must be even"),
    (ModelConfig, dict(attention_softcap=0.0), "_softcap is 0.0"),
    (ModelConfig, dict(logit_softcap=INF), "_softcap is inf"),
    (ModelConfig, dict(logit_softcap=NAN), "_softcap is nan"),
    (ModelConfig, dict(windows=(4, -1)), "model.windows (4, -1)"),
    (ModelConfig, dict(positions="rotray"), "model.positions is 'rotray': it must be one of learned, sinusoidal"),
    (ModelConfig, dict(activation="swish"), "model.activation is 'swish'"),
    (ModelConfig, dict(remat="some"), "model.remat is 'some'"),
    (ModelConfig, dict(dtype="float16"), "model.dtype is 'float16'"),
    (TokenizerConfig, dict(vocab_size=263), "tokenizer.vocab_size is 263: it must be finite and at least 264"),
    (TokenizerConfig, dict(special_tokens=("a", "a")), "('a', 'a')"),
    (TokenizerConfig, dict(special_tokens=("",)), "('',)"),
    (TokenizerConfig, dict(training_bytes=0), "tokenizer.training_bytes is 0"),
    (TokenizerConfig, dict(kind="wordpiece"), "tokenizer.kind is 'wordpiece'"),
    (DataConfig, dict(paths=()), "data.paths is empty"),
    (DataConfig, dict(weights=(1.0, 2.0)), "data.weights has 2 numbers for 1 data.paths"),
    (DataConfig, dict(weights=(0.0,)), "data.weights (0.0,)"),
    (DataConfig, dict(weights=(INF,)), "data.weights (inf,)"),
    (DataConfig, dict(val_fraction=0.6), "data.val_fraction is 0.6: it must be between 0 and 0.5"),
    (DataConfig, dict(max_bad_documents=-1), "data.max_bad_documents is -1"),
    (DataConfig, dict(shard_tokens=1023), "data.shard_tokens is 1023"),
    (OptimizerConfig, dict(peak_lr=0.0), "optimizer.peak_lr is 0.0"),
    (OptimizerConfig, dict(peak_lr=INF), "optimizer.peak_lr is inf"),
    (OptimizerConfig, dict(epsilon=0.0), "optimizer.epsilon is 0.0"),
    (OptimizerConfig, dict(warmup_steps=-1), "optimizer.warmup_steps is -1"),
    (OptimizerConfig, dict(clip_norm=-0.1), "optimizer.clip_norm is -0.1"),
    (OptimizerConfig, dict(weight_decay=NAN), "optimizer.weight_decay is nan"),
    (OptimizerConfig, dict(final_lr_ratio=1.1), "optimizer.final_lr_ratio is 1.1"),
    (OptimizerConfig, dict(decay_fraction=-0.1), "optimizer.decay_fraction is -0.1"),
    (OptimizerConfig, dict(beta1=1.0), "optimizer.beta1 is 1.0"),
    (OptimizerConfig, dict(beta2=1.0), "optimizer.beta2 is 1.0"),
    (OptimizerConfig, dict(ema_decay=1.0), "optimizer.ema_decay is 1.0"),
    (OptimizerConfig, dict(name="lion", epsilon=0.1), "epsilon is 0.1, but lion does not use it; leave it at 1e-08"),
    (OptimizerConfig, dict(name="adafactor", beta1=0.5), "optimizer.beta1 is 0.5, but adafactor does not use it"),
    (OptimizerConfig, dict(name="adam"), "optimizer.name is 'adam': it must be one of adamw, lion, adafactor, muon"),
    (OptimizerConfig, dict(schedule="cosin"), "optimizer.schedule is 'cosin'"),
    (TrainingConfig, dict(steps=0), "training.steps is 0"),
    (TrainingConfig, dict(batch_size=0), "training.batch_size is 0"),
    (
        TrainingConfig,
        dict(accumulation_steps=3),
        "training.batch_size 32 does not divide by training.accumulation_steps 3",
    ),
    (TrainingConfig, dict(seed=2**31), "training.seed is 2147483648"),
    (TrainingConfig, dict(log_every=0), "training.log_every is 0"),
    (TrainingConfig, dict(z_loss=INF), "training.z_loss is inf"),
    (CheckpointConfig, dict(every=0), "checkpoint.every is 0"),
    (CheckpointConfig, dict(keep_last=0), "checkpoint.keep_last is 0"),
    (CheckpointConfig, dict(keep_every=-1), "checkpoint.keep_every is -1"),
    (CheckpointConfig, dict(on_save_error="ignore"), "checkpoint.on_save_error is 'ignore'"),
    (MeshConfig, dict(data=0), "mesh (0, 1, 1)"),
    (MeshConfig, dict(data=-1, tensor=-1), "mesh (-1, 1, -1): sizes must be at least 1, and one of them can be -1"),
    (TrainConfig, dict(name=""), "name ''"),
    (TrainConfig, dict(name="a/b"), "name 'a/b'"),
    (
        TrainConfig,
        dict(model=ModelConfig(context_length=1023)),
        "model.context_length 1023 does not divide by training.loss_chunks 8",
    ),
]


@pytest.mark.parametrize(("section", "values", "message"), ILLEGAL)
def test_an_illegal_value_is_refused_in_one_line_with_the_numbers(
    section: type, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        section(**values)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_status == 2


def test_what_is_not_given_derives() -> None:
    model = ModelConfig(n_layers=5, windows=(1024, 0))
    assert (model.kv_heads, model.key_dim, model.ff_dim) == (12, 64, 3072)
    assert model.layer_windows == (1024, 0, 1024, 0, 1024)
    other = ModelConfig(n_kv_heads=4, head_dim=80, d_ff=1000)
    assert (other.kv_heads, other.key_dim, other.ff_dim, other.layer_windows) == (4, 80, 1000, (0,) * 12)
    assert str(TrainConfig(name="x").run_path) == "runs/x" and str(TrainConfig(run_dir="y").run_path) == "y"
