"""Schedules at their corners, decay by name, and each rule against its definition."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt.config import ModelConfig, OptimizerConfig
from jaxgpt.data.loader import Batch
from jaxgpt.kernels.cross_entropy import LossOptions
from jaxgpt.model import Transformer, parameter_name
from jaxgpt.training.step import batch_loss, learning_rate, make_optimizer

RULES = ("adamw", "lion", "adafactor", "muon")
L, D, H, K, F = 2, 12, 3, 5, 20

FLAT = OptimizerConfig(peak_lr=1.0, schedule="constant", warmup_steps=0, weight_decay=0.0, clip_norm=0.0)
"""The rule alone: no schedule, decay or clipping."""


def tree(seed: int) -> dict[str, Any]:
    """Random numbers in the shapes and under the names of a small model."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    attention = {
        "query": {"kernel": draw(L, D, H, K), "bias": draw(L, H, K)},
        "output": {"kernel": draw(L, H, K, D), "bias": draw(L, D)},
    }
    mlp = {"up": {"kernel": draw(L, D, F), "bias": draw(L, F)}, "down": {"kernel": draw(L, F, D), "bias": draw(L, D)}}
    layers = {"attention": attention, "attention_norm": {"scale": draw(L, D), "bias": draw(L, D)}, "mlp": mlp}
    return {"layers": layers, "token_embedding": draw(30, D), "final_norm": {"scale": draw(D)}}


def flat(parameters: Any) -> dict[str, np.ndarray]:
    return {parameter_name(path): np.asarray(p) for path, p in jax.tree_util.tree_leaves_with_path(parameters)}


# Schedules


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", {4: 1, 8: 0.1 + 0.9 * (1 + 2**-0.5) / 2, 12: 0.55, 20: 0.1, 999: 0.1}),
        ("linear", {4: 1, 8: 0.775, 12: 0.55, 20: 0.1, 999: 0.1}),
        ("wsd", {4: 1, 12: 1, 15: 1, 16: 0.82, 20: 0.1, 999: 0.1}),
        ("constant", {4: 1, 12: 1, 20: 1, 999: 1}),
    ],
)
def test_schedules_at_their_corners(schedule: Any, expected: dict[int, float]) -> None:
    """Warm-up of 4 steps from a fifth of the peak, the end at step 20; wsd decays in the last quarter."""
    config = OptimizerConfig(peak_lr=3.0, schedule=schedule, warmup_steps=4, decay_fraction=0.25)
    rate = learning_rate(config, 20)
    for step, share in ({0: 0.2, 1: 0.4, 2: 0.6, 3: 0.8} | expected).items():
        assert float(rate(step)) == pytest.approx(3 * share, rel=1e-6), step
    rates = [float(rate(step)) for step in range(4, 25)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("warmup_steps", [0, 20, 1000])
def test_schedules_without_room_for_a_part(schedule: Any, warmup_steps: int) -> None:
    """No warm-up starts at the peak; one that fills the run, or would outlast it, only just reaches the peak."""
    rate = learning_rate(OptimizerConfig(peak_lr=1.0, schedule=schedule, warmup_steps=warmup_steps), 20)
    rates = [float(rate(step)) for step in range(21)]
    assert rates[0] == pytest.approx(1 if warmup_steps == 0 else 1 / 21)
    assert max(rates) == pytest.approx(1)
    assert warmup_steps == 0 or np.argmax(rates) == 20


# Decay and clipping


def test_decay_is_for_matrices_and_embeddings_of_the_model() -> None:
    """A norm's scale is [L, D] in the stack, and a head's bias [L, H, K]: shapes do not tell."""
    config = ModelConfig(n_layers=L, d_model=16, n_heads=4, vocab_size=50, qk_norm="head", gated_mlp=True)
    model = Transformer(dataclasses.replace(config, tie_embeddings=False), jax.random.key(0))
    ones, rule = jax.tree.map(jnp.ones_like, model), make_optimizer(dataclasses.replace(FLAT, weight_decay=0.2), 10)
    updates, _ = jax.jit(rule.update)(jax.tree.map(jnp.zeros_like, ones), rule.init(ones), ones)
    decayed = {name for name, update in flat(updates).items() if (update != 0).all()}
    assert all((update == 0).all() for name, update in flat(updates).items() if name not in decayed)
    attention = {f"layers.attention.{name}.kernel" for name in ("query", "key", "value", "output")}
    mlp = {f"layers.mlp.{name}.kernel" for name in ("up", "gate", "down")}
    assert decayed == attention | mlp | {"token_embedding", "position_embedding", "unembedding"}


@pytest.mark.parametrize("name", RULES)
def test_every_rule_decays_by_name(name: Any) -> None:
    """With no gradient, what is left of an update is -rate * decay * p, or nothing."""
    rule = make_optimizer(dataclasses.replace(FLAT, name=name, peak_lr=0.5, weight_decay=0.2), 10)
    parameters = tree(0)
    updates, _ = jax.jit(rule.update)(jax.tree.map(jnp.zeros_like, parameters), rule.init(parameters), parameters)
    before = flat(parameters)
    for key, update in flat(updates).items():
        decayed = key.endswith((".kernel", "_embedding"))
        np.testing.assert_allclose(update, -0.1 * before[key] if decayed else 0, rtol=1e-6, atol=1e-30, err_msg=key)


@pytest.mark.parametrize(("clip_norm", "kept"), [(0.0, 1.0), (1e6, 1.0), (2.0, None)])
def test_gradients_are_clipped_by_their_global_norm(clip_norm: float, kept: float | None) -> None:
    """Seen in the first moment, which after one step is (1 - beta1) times the clipped gradient."""
    rule = make_optimizer(dataclasses.replace(FLAT, clip_norm=clip_norm), 10)
    gradients = tree(1)
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in flat(gradients).values()))
    assert norm > 10
    _, state = rule.update(gradients, rule.init(tree(0)), tree(0))
    factor = 0.1 * (2 / norm if kept is None else kept)
    for moment, gradient in zip(jax.tree.leaves(optax.tree.get(state, "mu")), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(moment, factor * gradient, rtol=2e-6)


# Rules


def test_adamw_is_optax_adamw() -> None:
    config = OptimizerConfig(peak_lr=0.1, warmup_steps=2, weight_decay=0.3, beta1=0.8, beta2=0.9, epsilon=1e-4)
    mask = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("kernel", "token_embedding"), tree(0))
    theirs = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(learning_rate(config, 5), 0.8, 0.9, 1e-4, weight_decay=0.3, mask=mask),
    )
    results = []
    for rule in (make_optimizer(config, 5), theirs):
        parameters, state = tree(0), rule.init(tree(0))
        for seed in range(1, 4):
            updates, state = jax.jit(rule.update)(tree(seed), state, parameters)
            parameters = optax.apply_updates(parameters, updates)
        results.append(flat(parameters))
    for key, p in results[0].items():
        np.testing.assert_allclose(p, results[1][key], rtol=1e-6, atol=1e-7, err_msg=key)


def test_muon_makes_the_updates_of_kernels_orthogonal() -> None:
    """In the singular vectors of the gradient, an update is nearly c times the identity: 5 Newton-Schulz steps leave
    values of 0.68 to 1.13. Its root mean square is 0.2, that of an Adam update, with any shape."""
    sizes = {"query": (D, H * K), "output": (H * K, D), "up": (D, F), "down": (F, D)}
    gradients, seen = tree(1), set()
    rule = make_optimizer(dataclasses.replace(FLAT, name="muon"), 10)
    updates, _ = jax.jit(rule.update)(gradients, rule.init(tree(0)), tree(0))
    slopes = flat(gradients)
    for key, update in flat(updates).items():
        if not key.endswith(".kernel"):
            continue
        part = key.split(".")[2]
        seen.add(part)
        rows, columns = sizes[part]
        for layer in range(L):
            u, values, v = np.linalg.svd(slopes[key][layer].reshape(rows, columns), full_matrices=False)
            assert values[0] / values[-1] > 3
            core = -u.T @ update[layer].reshape(rows, columns) @ v.T / (0.2 * max(rows, columns) ** 0.5)
            assert np.diag(core).min() > 0.6 and np.diag(core).max() < 1.25
            assert np.abs(core - np.diag(np.diag(core))).max() < 0.01
            assert 0.13 < np.sqrt(np.square(update[layer]).mean()) < 0.24
    assert seen == set(sizes)


def test_muon_leaves_all_else_to_adam() -> None:
    config = dataclasses.replace(FLAT, name="muon", beta1=0.9, beta2=0.9, epsilon=1e-3)
    rule, adam = make_optimizer(config, 10), optax.scale_by_adam(0.9, 0.9, 1e-3)
    state, adam_state = rule.init(tree(0)), adam.init(tree(0))
    for seed in (1, 2, 3):
        updates, state = jax.jit(rule.update)(tree(seed), state, tree(0))
        expected, adam_state = adam.update(tree(seed), adam_state)
        wanted = flat(expected)
        for key, update in flat(updates).items():
            if not key.endswith(".kernel"):
                np.testing.assert_allclose(update, -wanted[key], rtol=1e-5, atol=1e-6, err_msg=f"{seed} {key}")


T, V = 16, 50
MODEL = ModelConfig(
    n_layers=1, d_model=32, n_heads=2, context_length=T, vocab_size=V, attention_bias=False, mlp_bias=False
)  # fmt: skip


@pytest.fixture(scope="module")
def start() -> Transformer:
    return jax.jit(lambda: Transformer(MODEL, jax.random.key(0)))()


@pytest.mark.parametrize(("name", "peak_lr"), [("adamw", 3e-3), ("lion", 3e-3), ("adafactor", 0.1), ("muon", 3e-3)])
def test_every_rule_learns(start: Transformer, name: Any, peak_lr: float) -> None:
    """One batch again and again: the loss falls well below that of knowing nothing, log V."""
    text_BT = np.random.default_rng(0).integers(0, V, (4, T + 1)).astype(np.int32)
    where_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (4, T))
    batch = Batch(text_BT[:, :-1], text_BT[:, 1:], np.ones((4, T), np.int32), where_BT)
    rule = make_optimizer(OptimizerConfig(name=name, peak_lr=peak_lr, warmup_steps=5), 40)

    def loss(model: Transformer) -> jax.Array:
        return batch_loss(model, batch, jnp.full((4, T), 1 / (4 * T)), LossOptions(V))[0]

    def one(carry: tuple, _: None) -> tuple[tuple, jax.Array]:
        model, state = carry
        value, gradients = jax.value_and_grad(loss)(model)
        updates, state = rule.update(gradients, state, model)
        return (optax.apply_updates(model, updates), state), value

    losses = jax.jit(lambda start: jax.lax.scan(one, (start, rule.init(start)), length=40)[1])(start)
    assert losses[0] == pytest.approx(np.log(V), abs=0.1)
    assert losses[-1] < 0.6 * losses[0]
