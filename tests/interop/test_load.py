"""Parameters of every family out of files and into them: each in its place, none missing, unknown, or on one device."""

import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import made
import made_gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxgpt.errors import BadFileError, ConfigError
from jaxgpt.generation.engine import for_decoding
from jaxgpt.interop import load as load_module
from jaxgpt.interop.configs import FAMILIES, Family, canonical
from jaxgpt.interop.load import Layout, check_tensors, load_model
from jaxgpt.interop.tensors import StoredTensor
from jaxgpt.model import Transformer, parameter_name
from jaxgpt.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return made.tokenizer_of()


@pytest.fixture(scope="module", params=[*made.FAMILIES, *made.MORE])
def case(
    request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory, mesh_of: Callable
) -> tuple[str, Path, Transformer]:
    """Name, directory and model."""
    directory = tmp_path_factory.mktemp("hf")
    with mesh_of():
        return request.param, directory, made.write_hf(directory, request.param, tokenizer)


def by_name(model: Any) -> dict[str, Any]:
    return {parameter_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model)}


def leaves(model: Transformer) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in by_name(model).items()}


def test_every_family_is_here() -> None:
    there = {hf["model_type"] for hf in (made.FAMILIES | made.MORE).values()}
    assert there == FAMILIES.keys()


def test_a_directory_is_read_back_bit_for_bit(case: tuple, mesh_of: Callable) -> None:
    name, directory, model = case
    with mesh_of():
        stacked = made.load(directory, for_training=True)
        unstacked = made.load(directory)
        before, after, alone, decoding = map(leaves, (model, stacked, unstacked, for_decoding(model)))
    assert load_module.open_model(directory)[0].family.model_type == (made.FAMILIES | made.MORE)[name]["model_type"]
    assert before.keys() == after.keys()
    assert decoding.keys() == alone.keys() and len(alone) > len(before)
    for parameter, array in before.items():
        np.testing.assert_array_equal(after[parameter], array, parameter)
    for parameter, array in decoding.items():
        np.testing.assert_array_equal(alone[parameter], array, parameter)
        layer = re.match(r"layers\.(\d+)\.", parameter)
        stacked_array = before[re.sub(r"^layers\.\d+\.", "layers.", parameter)]
        same = stacked_array[int(layer[1])] if layer else stacked_array
        np.testing.assert_array_equal(np.sort(array, axis=None), np.sort(same, axis=None), parameter)


def test_gguf_gives_the_same_model(case: tuple, mesh_of: Callable, tmp_path: Path) -> None:
    """Bit for bit but for norms that GGUF holds as 1 + w."""
    name, directory, model = case
    if name in made.MORE:
        return
    made_gguf.convert(directory, tmp_path / "x.gguf")
    with mesh_of():
        again = load_model(tmp_path / "x.gguf", for_training=True)
        before, after = leaves(model), leaves(again.model)
        plus_one, difference = model.config.norm_plus_one, 0.0
        if plus_one or name in ("gpt2", "llama 3", "mixtral"):  # for the others it is the same program on the same bits
            difference = np.abs(made.logits_of(again.model) - made.logits_of(model)).max()
    for parameter, array in before.items():
        atol = 1e-6 if plus_one and parameter.endswith("norm.scale") else 0
        np.testing.assert_allclose(after[parameter], array, rtol=0, atol=atol, err_msg=parameter)
    assert difference <= (5e-5 if plus_one else 0) and canonical(again.config) == model.config
    assert (again.family in ("llama", "mistral")) == (name == "mistral") or again.family == made.FAMILIES[name][
        "model_type"
    ]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_tensors_and_settings_are_called_as_in_llama_cpp(family: Family) -> None:
    """As the tables of the `gguf` package have them."""
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == family.gguf)
    known = {gguf.TENSOR_NAMES[tensor].format(bid="{}") for tensor in gguf.MODEL_TENSORS[number]}
    assert {row.gguf.rpartition(".")[0] for row in family.rows} <= known | {"output"}  # llama.cpp's Gemmas tie it
    sections = [vars(section).values() for section in vars(gguf.Keys).values() if isinstance(section, type)]
    spelt = {value for section in sections for value in section if isinstance(value, str)}
    assert {f"{{arch}}.{key}" for key in family.gguf_keys.values()} <= spelt


# What is missing, unknown or damaged


@pytest.fixture
def llama(tokenizer: Tokenizer, mesh_of: Callable, tmp_path: Path) -> Path:
    with mesh_of():
        made.write_hf(tmp_path / "hf", "llama", tokenizer)
    return tmp_path / "hf"


UP = "model.layers.2.mlp.up_proj.weight"
DAMAGES: dict[str, tuple[Callable[[dict[str, np.ndarray]], object], str]] = {
    "missing": (lambda t: t.pop(UP), f"there is no tensor {UP}; restore the file"),
    "no last layer": (
        lambda t: [t.pop(name) for name in list(t) if ".layers.3." in name],
        "there is no tensor model.layers.3.self_attn.q_proj.weight",
    ),
    "unknown": (lambda t: t.update({"model.extra": np.ones(3)}), "1 tensors are unknown to llama, such as 'model.ex"),
    "one layer more": (
        lambda t: t.update({UP.replace("2", "4"): t[UP]}),
        "1 tensors are unknown to llama, such as 'model.layers.4.mlp.up_proj.weight'",
    ),
    "a bias": (lambda t: t.update({UP[:-6] + "bias": np.ones(64)}), f"unknown to llama, such as '{UP[:-6]}bias'"),
    "transposed": (lambda t: t.update({UP: t[UP].T.copy()}), f"tensor {UP} is F32[32, 64] and must be a float[64, 32]"),
    "flat": (lambda t: t.update({UP: t[UP].ravel()}), f"tensor {UP} is F32[2048] and must be a float[64, 32]"),
    "integers": (lambda t: t.update({UP: t[UP].astype(np.int32)}), f"tensor {UP} is I32[64, 32] and must be a float"),
    "not a number": (lambda t: t[UP].__setitem__((3, 5), np.nan), "parameter layers.2.mlp.up.kernel is not finite"),
    "infinite": (lambda t: t[UP].__setitem__((3, 5), -np.inf), "parameter layers.2.mlp.up.kernel is not finite"),
    "a smaller vocabulary": (
        lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:200].copy()}),
        "tensor model.embed_tokens.weight is F32[200, 32] and must be a float[350, 32]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_tensor_that_is_missing_unknown_or_damaged_is_refused_by_name(
    damage: str, llama: Path, mesh_of: Callable
) -> None:
    change, message = DAMAGES[damage]
    tensors = load_file(llama / "model.safetensors")
    change(tensors)
    save_file(tensors, llama / "model.safetensors")
    with mesh_of(), pytest.raises(BadFileError) as error:
        made.load(llama)
    assert message in str(error.value) and str(error.value).startswith(f"model {llama}: ")


def test_nothing_is_read_before_every_name_and_shape_is_compared(llama: Path) -> None:
    def read() -> np.ndarray:
        raise AssertionError("read too early")

    layout, tensors, _ = load_module.open_model(llama)
    unread = {name: StoredTensor(tensor.shape, tensor.kind, read) for name, tensor in tensors.items()}
    check_tensors(layout, unread)
    last = unread.pop("lm_head.weight")
    with pytest.raises(BadFileError, match=r"no tensor lm_head\.weight"):
        check_tensors(layout, unread)
    with pytest.raises(BadFileError, match="unknown to llama"):
        check_tensors(layout, unread | {"lm_head.weight": last, "x": last})


def test_what_is_computed_or_tied_is_counted_and_left_out(
    tokenizer: Tokenizer, mesh_of: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Causal masks of the first GPT-2 files, whose names have no prefix; frequencies and a copy of tied embeddings."""
    with mesh_of():
        for name in ("gpt2", "llama 3"):
            model = made.write_hf(tmp_path / name, name, tokenizer)
            tensors = load_file(tmp_path / name / "model.safetensors")
            if name == "gpt2":
                tensors = {key.removeprefix("transformer."): value for key, value in tensors.items()}
                tensors |= {
                    f"h.{i}.attn.{kind}": np.ones((1, 1, 4, 4)) for i in range(4) for kind in ("bias", "masked_bias")
                }
            else:
                tensors |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4) for i in range(4)}
                tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
            save_file(tensors, tmp_path / name / "model.safetensors")
            again = made.load(tmp_path / name, for_training=True)
            np.testing.assert_array_equal(made.logits_of(again), made.logits_of(model))
            count = {"gpt2": 8, "llama 3": 5}[name]
            assert f"{count} tensors are computed here, such as " in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_halves_are_read_as_what_they_are(dtype: str, llama: Path, mesh_of: Callable) -> None:
    import ml_dtypes

    narrow = {"F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}[dtype]
    layout, tensors, _ = load_module.open_model(llama)
    arrays = {name: tensor.read().astype(narrow) for name, tensor in tensors.items()}
    save_file(arrays, llama / "model.safetensors")
    with mesh_of():
        model = made.load(llama)
    up = np.asarray(model.layers[2].mlp.up.kernel[...])
    assert up.dtype == np.float32
    np.testing.assert_array_equal(up, arrays[UP].astype(np.float32))  # outputs first, as a CPU decodes
    assert layout.config.dtype == "float32"


def test_the_arithmetic_is_float32_unless_asked(llama: Path, mesh_of: Callable) -> None:
    with mesh_of():
        assert load_model(llama).config.dtype == "float32"
        narrow = load_model(llama, dtype="bfloat16")
        with pytest.raises(ConfigError, match=r"step 3: .* has its own; leave it out"):
            load_model(llama, step=3)
    assert narrow.config.dtype == "bfloat16" and narrow.model.layers[0].mlp.up.kernel[...].dtype == "bfloat16"


def test_more_tokens_than_embeddings_are_reported_or_refused(
    llama: Path, tokenizer: Tokenizer, mesh_of: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    with mesh_of():
        made.write_hf(llama, "llama", tokenizer, vocab_size=330)
        load_model(llama)
        assert f"{llama}: 10 tokens of its tokenizer have no embedding" in capsys.readouterr().err


# Placement

MESHES = [(1, 8, 1), (2, 2, 2), (1, 1, 8)]
WIDE = dict(num_attention_heads=16, num_key_value_heads=8, hidden_size=64, head_dim=4, intermediate_size=128)


class Watch:
    """What is on the host and on the devices while a model is loaded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: list[weakref.ref] = []
        self.most_read = self.placed = self.cut = 0
        real_open, real_put = load_module.open_model, jax.device_put

        def opened(path: Path) -> tuple[Layout, dict[str, StoredTensor], Callable]:
            layout, tensors, tokenizer = real_open(path)
            watched = {n: StoredTensor(t.shape, t.kind, self.reading(t)) for n, t in tensors.items()}
            return layout, watched, tokenizer

        def put(array: Any, sharding: Any) -> jax.Array:
            assert isinstance(array, np.ndarray), "it is on a device already"
            placed = real_put(array, sharding)
            assert {shard.data.shape for shard in placed.addressable_shards} == {sharding.shard_shape(array.shape)}
            assert placed.sharding.device_set == set(jax.sharding.get_mesh().devices.flat)
            self.placed += 1
            mesh = jax.sharding.get_mesh().shape
            if array.nbytes > 5000:  # norms, and routers over tensor, are whole
                parts = {array.nbytes // shard.data.nbytes for shard in placed.addressable_shards}
                assert parts == {mesh["fsdp"] * mesh["tensor"]}
                self.cut += 1
            return placed

        monkeypatch.setattr(load_module, "open_model", opened)
        monkeypatch.setattr("jaxgpt.interop.load.jax.device_put", put)

    def reading(self, tensor: StoredTensor) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            there = sum(1 for each in self.read if each() is not None)
            self.most_read = max(self.most_read, there + 1)
            array = tensor.read()
            self.read.append(weakref.ref(array))
            return array

        return read


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("name", ["mixtral", "phi3"])
@pytest.mark.parametrize("for_training", [False, True])
def test_parameters_go_to_their_devices_in_parts(
    name: str, sizes: tuple, for_training: bool, mesh_of: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each once, from the host to where it is cut; no device ever has a whole that is cut over several, and the host
    drops what it has read before it reads the next parameter."""
    with mesh_of():
        written = made.write_hf(tmp_path / "hf", name, files=4, **WIDE)
        expected = leaves(written if for_training else for_decoding(written))
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3
    watch = Watch(monkeypatch)
    with mesh_of(*sizes):
        loaded = made.load(tmp_path / "hf", for_training=for_training)
        assert watch.placed == len(jax.tree.leaves(loaded)) and watch.cut >= (9 if for_training else 30)
        assert watch.most_read <= (6 if name == "mixtral" else 2), "all experts of one layer are one parameter"
        born = jax.eval_shape(lambda: Transformer(loaded.config, jax.random.key(0)))
        born = by_name(born if for_training else jax.eval_shape(for_decoding, born))
    assert by_name(loaded).keys() == expected.keys() == born.keys()
    for parameter, leaf in by_name(loaded).items():
        np.testing.assert_array_equal(leaf, expected[parameter], parameter)
        assert leaf.sharding.spec == born[parameter].sharding.spec, parameter
    heads = born["layers.attention.query.kernel" if for_training else "layers.0.attention.query.kernel"].sharding.spec
    assert tuple(heads) == ((None, "fsdp", "tensor", None) if for_training else ("tensor", None, "fsdp"))
