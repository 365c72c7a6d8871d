"""One training step: the same on every mesh and in any number of parts, the same bits each time, never poisoned."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.config import ModelConfig, OptimizerConfig, TrainConfig, TrainingConfig
from jaxgpt.data.loader import Batch, make_batch
from jaxgpt.data.shards import TokenStream
from jaxgpt.model import Transformer, parameter_name
from jaxgpt.sharding import place, place_shapes
from jaxgpt.training import step as step_module
from jaxgpt.training.step import (
    TrainState,
    batch_loss,
    eval_step,
    init_state,
    loss_options,
    make_optimizer,
    make_train_step,
)

B, T, V = 32, 16, 60
MESHES = [(1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 1, 8)]

CONFIG = TrainConfig(
    model=ModelConfig(
        n_layers=2, d_model=32, n_heads=16, n_kv_heads=8, head_dim=4, d_ff=64, context_length=T, vocab_size=V,
        positions="rotary", norm="rmsnorm", windows=(8, 0), attention_softcap=5.0, logit_softcap=10.0,
        attention_bias=False, mlp_bias=False,
    ),
    optimizer=OptimizerConfig(peak_lr=1e-2, warmup_steps=2, epsilon=1e-5),
    training=TrainingConfig(steps=10, batch_size=B, loss_chunks=2),
)  # fmt: skip
"""Everything divides by 8. A gradient that is 0 but for rounding is below epsilon, so that Adam does not blow it up."""


def with_options(config: TrainConfig = CONFIG, **sections: dict[str, Any]) -> TrainConfig:
    """`with_options(training=dict(z_loss=0.1))` is CONFIG with that change."""
    changed = {name: dataclasses.replace(getattr(config, name), **options) for name, options in sections.items()}
    return dataclasses.replace(config, **changed)


def batch_of(seed: int = 0) -> Batch:
    """Packed rows of random documents; some run over the stream's end, so that rows differ in real labels."""
    rng = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.cumsum(rng.integers(3, 20, 100))])
    stream = TokenStream([rng.integers(0, V, 500).astype("<u4")], starts[starts < 500])
    return make_batch([(stream, begin) for begin in rng.permutation(np.arange(B) * T).tolist()], T)


class Runner:
    """A compiled step on a mesh, and its first state."""

    def __init__(self, mesh_of: Callable[..., AbstractContextManager], config: TrainConfig, *sizes: int) -> None:
        self.config, self.step, self.context = config, make_train_step(config), lambda: mesh_of(*sizes)
        with self.context():
            shapes = place_shapes(jax.eval_shape(lambda: init_state(config)))
            self._first = placed(first_state(config), shapes)

    def first(self) -> TrainState:
        """A copy, since the step takes over what it is given."""
        with self.context():
            return jax.tree.map(jnp.copy, self._first)

    def run(self, batches: list[Batch], state: TrainState | None = None) -> tuple[TrainState, list[dict[str, Any]]]:
        """The state after the batches, and each step's metrics."""
        state, history = state or self.first(), []
        with self.context():
            for batch in batches:
                state, metrics = self.step(state, place(batch, "BT"))
                history.append(jax.device_get(metrics))
        return state, history


def first_state(config: TrainConfig) -> TrainState:
    """The state before step 0, on the host."""
    sure = dataclasses.replace(config.model, dropout=0.0)  # neither this nor the batch changes the numbers
    return _drawn(dataclasses.replace(config, model=sure, training=CONFIG.training))


@functools.cache
def _drawn(config: TrainConfig) -> TrainState:
    return jax.device_get(jax.jit(lambda: init_state(config))())


def placed(host: Any, shapes: Any) -> Any:
    """The host's arrays, in the tree and on the devices of `shapes`."""
    arrays = zip(jax.tree.leaves(host), jax.tree.leaves(shapes), strict=True)
    return jax.tree.unflatten(jax.tree.structure(shapes), [jax.device_put(a, s.sharding) for a, s in arrays])


@pytest.fixture(scope="module")
def runner(mesh_of: Callable) -> Callable[..., Runner]:
    """`runner(config, data, fsdp, tensor)`, compiled once for the whole file."""
    return functools.cache(functools.partial(Runner, mesh_of))


def assert_near(got: Any, expected: Any, *, relative: float, absolute: float) -> None:
    """Every leaf, within `relative` of its largest number plus `absolute`."""
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        error, bound = np.abs(one - other).max(), relative * np.abs(other).max() + absolute
        assert error <= bound, f"{jax.tree_util.keystr(path)}: {error} > {bound}"


def same_bits(one: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


# Meshes and parts


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES[1:])
def test_every_mesh_computes_the_same_step(runner: Callable[..., Runner], sizes: tuple[int, int, int]) -> None:
    """Loss, gradients (in Adam's first moment) and parameters after one step and after three."""
    batches = [batch_of(seed) for seed in range(3)]
    for count in (1, 3):
        expected, expected_metrics = runner(CONFIG, 1, 1, 1).run(batches[:count])
        got, metrics = runner(CONFIG, *sizes).run(batches[:count])
        assert_near(metrics, expected_metrics, relative=1e-5, absolute=0)
        assert_near(got.optimizer, expected.optimizer, relative=1e-5, absolute=1e-8)
        assert_near(got.model, expected.model, relative=0, absolute=1e-5)


@functools.cache
def one_update_by_each_rule(mesh_of: Callable, *sizes: int) -> tuple[dict[str, np.ndarray], dict[str, dict]]:
    """Gradients of the first batch by parameter, and what Lion, Adafactor and Muon make of them."""

    def updates(model: Transformer, batch: Batch) -> tuple[Transformer, dict[str, Transformer]]:
        weights_BT = (batch.labels >= 0) / 100
        gradients = jax.grad(lambda m: batch_loss(m, batch, weights_BT, loss_options(CONFIG))[0])(model)
        updated = {}
        for name in ("lion", "adafactor", "muon"):
            epsilon = CONFIG.optimizer.epsilon if name == "muon" else 1e-8  # the others have none
            config = dataclasses.replace(CONFIG.optimizer, name=name, epsilon=epsilon)
            rule = make_optimizer(config, CONFIG.training.steps)
            updated[name] = rule.update(gradients, rule.init(model), model)[0]
        return gradients, updated

    with mesh_of(*sizes):
        shapes = place_shapes(jax.eval_shape(lambda: init_state(CONFIG).model))
        model = placed(first_state(CONFIG).model, shapes)
        gradients, updated = jax.device_get(jax.jit(updates)(model, place(batch_of(), "BT")))
    by_name = lambda tree: {parameter_name(path): p for path, p in jax.tree_util.tree_leaves_with_path(tree)}  # noqa: E731
    return by_name(gradients), {name: by_name(tree) for name, tree in updated.items()}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES[2:])
def test_every_rule_updates_alike_on_every_mesh(mesh_of: Callable, sizes: tuple[int, int, int]) -> None:
    """One update of Lion, Adafactor and Muon, against one device; Adam's are above.

    The first two divide a gradient by its own size: where that is rounding error, so is the sign of the update.
    """
    (gradients, expected), (_, got) = (
        one_update_by_each_rule(mesh_of, 1, 1, 1),
        one_update_by_each_rule(mesh_of, *sizes),
    )
    for rule, updates in expected.items():
        for name, update in updates.items():
            real = (np.abs(gradients[name]) > 1e-6) | (rule == "muon")
            error = np.abs(got[rule][name] - update)[real].max(initial=0)
            assert error < (1e-3 if rule == "muon" else 1e-5) * np.abs(update).max(), f"{rule} {name}"


PARTS = with_options(training=dict(accumulation_steps=4))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 1), (2, 2, 2)])
def test_parts_make_no_difference(runner: Callable[..., Runner], sizes: tuple[int, int, int]) -> None:
    """A mean of the parts' means would be wrong here: their numbers of real labels differ."""
    batches = [batch_of(seed) for seed in range(3)]
    real = (batches[0].labels >= 0).sum(1)
    assert len({real[part::4].sum() for part in range(4)}) > 1
    expected, expected_metrics = runner(CONFIG, 1, 1, 1).run(batches)
    got, metrics = runner(PARTS, *sizes).run(batches)
    assert_near(metrics, expected_metrics, relative=1e-5, absolute=0)
    assert_near(got.optimizer, expected.optimizer, relative=1e-5, absolute=1e-8)
    assert_near(got.model, expected.model, relative=0, absolute=1e-5)


# The same bits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "sizes"),
    [(CONFIG, sizes) for sizes in MESHES] + [(PARTS, sizes) for sizes in [(1, 1, 1), (2, 1, 1), (2, 2, 2)]],
)
def test_a_step_gives_the_same_bits_each_time(
    runner: Callable[..., Runner], config: TrainConfig, sizes: tuple[int, int, int]
) -> None:
    results = [runner(config, *sizes).run([batch_of(0), batch_of(1)]) for _ in range(8)]
    assert all(same_bits(result, results[0]) for result in results[1:])


DROPOUT = with_options(model=dict(dropout=0.2))


@pytest.mark.slow
def test_dropout_depends_on_the_step_alone(runner: Callable[..., Runner]) -> None:
    """The same on every mesh, other at another step."""
    here, batch = runner(DROPOUT, 1, 1, 1), batch_of()
    one, other = (here.run([batch, batch]) for _ in range(2))
    assert same_bits(one, other)
    _, (moved,) = here.run([batch], here.first()._replace(step=jnp.int32(1)))
    assert abs(moved["loss"] - one[1][0]["loss"]) > 1e-4
    elsewhere, _ = runner(DROPOUT, 2, 2, 2).run([batch, batch])
    assert_near(elsewhere.model, one[0].model, relative=0, absolute=1e-5)


# What a step does


def test_five_steps_give_the_recorded_losses(runner: Callable[..., Runner]) -> None:
    _, history = runner(CONFIG, 1, 1, 1).run([batch_of()] * 5)
    losses = [float(metrics["loss"]) for metrics in history]
    recorded = [4.09698, 4.00796, 3.92634, 3.84520, 3.76717]
    assert losses == pytest.approx(recorded, rel=1e-4), (
        "the arithmetic of training has changed: initialisation, model, loss, optimizer or schedule. If that is what "
        f"you want, say so in CHANGELOG.md (old runs will not continue as they began) and record {losses}"
    )


@pytest.mark.parametrize("sizes", [(1, 1, 1), pytest.param((2, 2, 2), marks=pytest.mark.slow)])
def test_one_compilation_serves_all_steps_and_the_state_is_donated(
    runner: Callable[..., Runner], sizes: tuple[int, int, int]
) -> None:
    """From the state as a run makes it; that state is the same on every mesh."""
    here = runner(CONFIG, *sizes)
    with here.context():
        state = jax.jit(init_state, static_argnums=0)(CONFIG)
        assert_near(state, first_state(CONFIG), relative=1e-6, absolute=0)
        for seed in range(3):
            before = jax.tree.leaves(state)
            state, _ = here.step(state, place(batch_of(seed), "BT"))
            assert all(leaf.is_deleted() for leaf in before)
        assert here.step._cache_size() == 1
        assert state.step == 3


def test_metrics_tell_tokens_loss_and_rate(runner: Callable[..., Runner]) -> None:
    """The reported loss is the plain mean over real labels."""
    here, batch = runner(CONFIG, 1, 1, 1), batch_of()
    model = here.first().model
    _, (metrics,) = here.run([batch])
    nll_BT = plain_nll(model, batch)
    real_BT = batch.labels >= 0
    assert metrics["tokens"] == real_BT.sum() and metrics["finite"]
    assert metrics["loss"] == pytest.approx(nll_BT[real_BT].mean(), rel=1e-6)
    assert metrics["learning_rate"] == pytest.approx(1e-2 / 3)
    nothing = batch._replace(labels=np.full_like(batch.labels, -1))
    _, (metrics,) = here.run([nothing])
    assert (metrics["tokens"], metrics["loss"], metrics["grad_norm"], metrics["finite"]) == (0, 0, 0, True)


@jax.jit
def hidden_logits(model: Transformer, batch: Batch) -> jax.Array:
    return model.logits(model(batch.tokens, positions_BT=batch.positions, segments_BT=batch.segment_ids)[0])


def plain_nll(model: Transformer, batch: Batch) -> np.ndarray:
    """[B, T] in float64, by the definition."""
    logits_BTV = np.asarray(hidden_logits(jax.device_get(model), batch), np.float64)
    log_z_BT = np.log(np.exp(logits_BTV).sum(-1))
    return log_z_BT - np.take_along_axis(logits_BTV, np.maximum(batch.labels, 0)[:, :, None], -1)[:, :, 0]


def test_evaluation_sums_each_row(runner: Callable[..., Runner]) -> None:
    here, batch = runner(CONFIG, 1, 1, 1), batch_of()
    with here.context():
        model = here.first().model
        rows_B = eval_step(model, place(batch, "BT"), loss_options(CONFIG))
    expected_B = (plain_nll(model, batch) * (batch.labels >= 0)).sum(1)
    np.testing.assert_allclose(rows_B, expected_B, rtol=1e-6)


def poisoned_loss(*arguments: Any) -> tuple[jax.Array, jax.Array, None]:
    """The loss, spoilt when the largest token is 57 (NaN), 58 (infinite) or 59 (finite, but its gradient is NaN)."""
    total, losses_BT, router = batch_loss(*arguments)
    assert router is None
    largest = arguments[1].tokens.max()
    factor = jnp.where(largest == 57, jnp.nan, jnp.where(largest == 58, jnp.inf, 1.0))
    kink = 0 * jnp.sqrt(jnp.where(largest == 59, 0.0, 1.0) * total)  # the slope of a root is infinite at 0
    return factor * total + kink, factor * losses_BT, None


@pytest.fixture(scope="module")
def guarded(mesh_of: Callable) -> Iterator[Runner]:
    """With z-loss and a moving average, and a loss that can be poisoned."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "batch_loss", poisoned_loss)
        yield Runner(mesh_of, with_options(training=dict(z_loss=0.1), optimizer=dict(ema_decay=0.9)), 1, 1, 1)


def clean(seed: int = 0) -> Batch:
    batch = batch_of(seed)
    return batch._replace(tokens=np.minimum(batch.tokens, 56))


def test_z_loss_pulls_but_is_not_reported(runner: Callable[..., Runner], guarded: Runner) -> None:
    plain, (expected,) = runner(CONFIG, 1, 1, 1).run([clean()])
    state, (metrics,) = guarded.run([clean()])
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert metrics["grad_norm"] > 1.01 * expected["grad_norm"]
    assert not same_bits(state.model, plain.model)


def test_the_average_follows_its_formula(guarded: Runner) -> None:
    state = guarded.first()
    expected = jax.device_get(state.model)
    assert same_bits(state.raw_model, expected)
    for seed in range(3):
        state, _ = guarded.run([clean(seed)], state)
        expected = jax.tree.map(lambda average, p: 0.9 * average + 0.1 * np.asarray(p), expected, state.raw_model)
        assert_near(state.model, expected, relative=1e-6, absolute=0)
        assert not same_bits(state.model, state.raw_model)


@pytest.mark.parametrize("poison", [57, 58, 59])
def test_what_is_not_finite_is_not_applied(guarded: Runner, poison: int) -> None:
    """Parameters, moments and average keep their bits, only the step moves on, and the next batch trains again."""
    before, _ = guarded.run([clean(0), clean(1)])
    copy = functools.partial(jax.tree.map, jnp.copy, before)
    expected, (healthy,) = guarded.run([clean(2)], copy())
    bad = clean(2)._replace(tokens=np.where(np.arange(T) == 3, poison, clean(2).tokens))
    after, (metrics,) = guarded.run([bad], copy())
    assert healthy["finite"] and not metrics["finite"]
    assert np.isfinite(metrics["loss"]) == (poison == 59)
    assert after.step == before.step + 1
    assert same_bits(after._replace(step=before.step), before)
    later, (metrics,) = guarded.run([clean(2)], after)
    assert metrics["finite"] and metrics["learning_rate"] == healthy["learning_rate"]
    assert same_bits(later._replace(step=expected.step), expected)
