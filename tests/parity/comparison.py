"""What is compared with transformers and PyTorch, and how: shared by the recorded and the live tests.

A reference is a dictionary of arrays, made by `make_reference.py` and kept in `reference/` or made anew:

    weights/NAME                                    the parameters, under transformers' names
    whole/tokens, labels, segment_ids, positions    a batch [B, T] with one document a row, a `Batch` of jaxgpt
    whole/logits, loss, gradients/NAME              what transformers makes of it
    packed/...                                      the same for rows of several documents, each run alone there
    train/tokens, labels                            a batch for each of 20 steps [N, B, T]
    train/losses, grad_norms, learning_rates        what PyTorch's AdamW makes of them [N]

The checks need a mesh that is set.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import ModelConfig, OptimizerConfig, TrainConfig, TrainingConfig
from jaxgpt.data.loader import Batch
from jaxgpt.interop.configs import family_of
from jaxgpt.interop.load import Layout, load_weights, stored_tensors
from jaxgpt.interop.tensors import StoredTensor
from jaxgpt.kernels.cross_entropy import LossOptions
from jaxgpt.model import Transformer, parameter_name
from jaxgpt.sharding import shard
from jaxgpt.training.step import TrainState, batch_loss, loss_options, make_optimizer, make_train_step

MAX_LOGIT_DIFFERENCE = 1e-4
MAX_GRADIENT_DIFFERENCE = 1e-3  # in each tensor, over its largest gradient
MAX_LOSS_DIFFERENCE = 1e-4

REFERENCE = Path(__file__).parent / "reference"
STEPS, ROWS = 20, 4
Reference = Mapping[str, np.ndarray]
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """One small model, and the optimizer that trains it."""

    name: str
    model: ModelConfig
    optimizer: OptimizerConfig
    accumulation_steps: int = 1

    @property
    def train_config(self) -> TrainConfig:
        training = TrainingConfig(
            steps=STEPS, batch_size=ROWS, accumulation_steps=self.accumulation_steps, loss_chunks=2
        )
        return TrainConfig(model=self.model, optimizer=self.optimizer, training=training)

    @property
    def options(self) -> LossOptions:
        return loss_options(self.train_config)

    @property
    def file(self) -> Path:
        return REFERENCE / f"{self.name}.npz"


# 61 tokens leave 67 of the embedding's 128 rows without meaning. A weight decay of 1 changes the losses visibly within
# 20 steps, and so does an epsilon of 1e-3; the default 1e-8 shows that tiny gradients agree too.
_GPT2 = dict(n_layers=2, d_model=16, n_heads=4, context_length=16, vocab_size=61)
_LLAMA = _GPT2 | dict(
    n_kv_heads=2, d_ff=24, positions="rotary", rope_theta=100.0, norm="rmsnorm", norm_epsilon=1e-6, activation="silu",
    gated_mlp=True, attention_bias=False, mlp_bias=False, tie_embeddings=False,
)  # fmt: skip
_ADAMW = dict(peak_lr=3e-2, warmup_steps=5, weight_decay=1.0, clip_norm=1.0)


def gpt2(name: str, optimizer: dict | None = None, accumulation_steps: int = 1, **model: object) -> Case:
    settings = OptimizerConfig(**_ADAMW | (optimizer or {}))
    return Case(name, ModelConfig(**_GPT2 | model), settings, accumulation_steps)  # type: ignore[arg-type]


def llama(name: str, optimizer: dict | None = None, accumulation_steps: int = 1, **model: object) -> Case:
    settings = OptimizerConfig(**_ADAMW | (optimizer or {}))
    return Case(name, ModelConfig(**_LLAMA | model), settings, accumulation_steps)  # type: ignore[arg-type]


RECORDED = [gpt2("gpt2"), llama("llama", dict(epsilon=1e-3, beta2=0.99, clip_norm=1.5))]


def recorded(case: Case) -> Reference:
    with np.load(case.file, allow_pickle=False) as file:
        return dict(file)


def under(prefix: str, reference: Reference) -> Arrays:
    """`under("weights/", reference)`: the arrays below a name."""
    return {name.removeprefix(prefix): array for name, array in reference.items() if name.startswith(prefix)}


def on_mesh(batch: Batch) -> Batch:
    return Batch(*(shard(jnp.asarray(array, jnp.int32), "BT") for array in batch))  # type: ignore[arg-type]


def batch_of(kind: str, reference: Reference) -> Batch:
    return on_mesh(Batch(*(reference[f"{kind}/{field}"] for field in Batch._fields)))


def layout(case: Case) -> Layout:
    return Layout(family_of("gpt2" if case.model.positions == "learned" else "llama", "reference"), case.model)


def load(case: Case, reference: Reference, padding: float = 0.0) -> Transformer:
    """The reference's model in jaxgpt, on the mesh, with `padding` added to the vocabulary's padding rows."""
    weights = under("weights/", reference)
    tensors = {name: StoredTensor(array.shape, "F32", lambda array=array: array) for name, array in weights.items()}
    model = load_weights(layout(case), tensors, for_training=True)

    def pad(path: tuple, leaf: jax.Array) -> jax.Array:
        if parameter_name(path) not in ("token_embedding", "unembedding"):
            return leaf
        array = np.array(leaf)
        array[case.model.vocab_size :] += padding
        return jax.device_put(array, leaf.sharding)

    return jax.tree_util.tree_map_with_path(pad, model)


@functools.partial(jax.jit, static_argnums=2)
def evaluate(model: Transformer, batch: Batch, options: LossOptions) -> tuple[jax.Array, jax.Array, Transformer]:
    """Logits, mean loss over the labels, and its gradients."""
    real_BT = batch.labels >= 0
    weights_BT = real_BT / real_BT.sum()
    hidden_BTD, *_ = model(batch.tokens, positions_BT=batch.positions, segments_BT=batch.segment_ids)
    loss, gradients = jax.value_and_grad(lambda model: batch_loss(model, batch, weights_BT, options)[0])(model)
    return model.logits(hidden_BTD), loss, gradients


def by_name(model: Transformer) -> Arrays:
    """The parameters, or gradients, by jaxgpt's names."""
    return {parameter_name(path): np.asarray(p) for path, p in jax.tree_util.tree_leaves_with_path(model)}


def assert_logits_and_gradients(case: Case, reference: Reference, kind: str) -> None:
    """The difference of a gradient is max |a - b| / max |b| in each of transformers' tensors, b being PyTorch's."""
    logits, loss, gradients = evaluate(load(case, reference), batch_of(kind, reference), case.options)
    assert np.abs(logits - reference[f"{kind}/logits"]).max() <= MAX_LOGIT_DIFFERENCE
    assert abs(loss - reference[f"{kind}/loss"]) <= MAX_LOSS_DIFFERENCE
    ours = {name: tensor.read() for name, tensor in stored_tensors(gradients, layout(case).family).items()}
    theirs = under(f"{kind}/gradients/", reference)
    assert ours.keys() == theirs.keys()
    assert all(np.abs(b).max() > 1e-4 for b in theirs.values()), "a gradient that is nothing but rounding"
    differences = {name: np.abs(ours[name] - b).max() / np.abs(b).max() for name, b in theirs.items()}
    assert max(differences.values()) <= MAX_GRADIENT_DIFFERENCE, differences


def assert_plain_logits(case: Case, reference: Reference) -> None:
    """Those of a call with nothing but tokens."""
    model, tokens_BT = load(case, reference), batch_of("whole", reference).tokens
    logits = jax.jit(lambda model, tokens_BT: model.logits(model(tokens_BT)[0]))(model, tokens_BT)
    assert np.abs(logits - reference["whole/logits"]).max() <= MAX_LOGIT_DIFFERENCE


def assert_training(case: Case, reference: Reference) -> None:
    """jaxgpt's own training step follows PyTorch's loss, gradient norm and learning rate at every step."""
    model = load(case, reference)
    optimizer = make_optimizer(case.optimizer, STEPS).init(model)
    state, train_step = TrainState(jnp.zeros((), jnp.int32), model, optimizer, None), make_train_step(case.train_config)
    records = []
    for tokens, labels in zip(reference["train/tokens"], reference["train/labels"], strict=True):
        state, metrics = train_step(state, on_mesh(whole_batch(tokens, labels)))
        assert metrics["finite"] and metrics["tokens"] == (labels >= 0).sum()
        records.append([float(metrics[name]) for name in ("loss", "grad_norm", "learning_rate")])
    losses, norms, rates = np.array(records).T
    np.testing.assert_allclose(losses, reference["train/losses"], rtol=0, atol=MAX_LOSS_DIFFERENCE)
    np.testing.assert_allclose(norms, reference["train/grad_norms"], rtol=MAX_GRADIENT_DIFFERENCE)
    np.testing.assert_allclose(rates, reference["train/learning_rates"], rtol=1e-5)


def whole_batch(tokens: np.ndarray, labels: np.ndarray) -> Batch:
    """Rows of one document each."""
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return Batch(tokens, labels, np.ones_like(tokens), positions)


def assert_padding_rows_mean_nothing(case: Case, reference: Reference) -> None:
    """Rows of the embedding beyond the vocabulary change no logit, loss or gradient, and have none themselves."""
    batch = batch_of("packed", reference)
    results = [evaluate(load(case, reference, padding), batch, case.options) for padding in (0.0, 1e4)]
    (logits, loss, gradients), (other_logits, other_loss, other_gradients) = results
    assert logits.shape[-1] == case.model.vocab_size
    np.testing.assert_array_equal(logits, other_logits)
    assert loss == other_loss
    for name, gradient in by_name(other_gradients).items():
        np.testing.assert_array_equal(gradient, by_name(gradients)[name], err_msg=name)
        if name in ("token_embedding", "unembedding"):
            assert gradient.shape[0] > case.model.vocab_size and not gradient[case.model.vocab_size :].any()
