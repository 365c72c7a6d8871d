"""The network: what a token may see, that every path through it computes the same, and how it starts."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgpt.config import ModelConfig
from jaxgpt.model import Cache, Transformer, layers, new_cache, parameter_count, parameter_name, transformer
from jaxgpt.model.layers import dropout
from jaxgpt.model.rotary import rotate, rotations_of

B, T, V = 2, 12, 50

VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "first-transformer": dict(positions="sinusoidal", norm_position="post", activation="relu", scale_embeddings=True),
    "llama": dict(
        positions="rotary", rope_theta=100.0, norm="rmsnorm", n_kv_heads=2, attention_bias=False, mlp_bias=False,
        activation="silu", gated_mlp=True, tie_embeddings=False,
    ),
    "gemma": dict(
        positions="rotary", norm="rmsnorm", n_kv_heads=1, head_dim=12, gated_mlp=True, scale_embeddings=True,
        attention_softcap=1.0, logit_softcap=1.5, windows=(4, 0),
    ),
    "qk-norm": dict(positions="rotary", norm="rmsnorm", n_kv_heads=2, qk_norm="head", tie_embeddings=False, d_ff=40),
    "no-positions": dict(
        positions="none", norm="rmsnorm", norm_position="post", windows=(5, 0), activation="gelu", scan_layers=False,
    ),
    "no-norm-bias": dict(norm_bias=False, mlp_bias=False, attention_softcap=1.0, windows=(3,), gated_mlp=True),
}  # fmt: skip
VARIANTS["llama-bfloat16"] = VARIANTS["llama"] | dict(dtype="bfloat16")


def tiny(**options: Any) -> ModelConfig:
    sizes = dict(n_layers=2, d_model=32, n_heads=4, context_length=16, vocab_size=V)
    return ModelConfig(**(sizes | options))


def parameters(model: Transformer) -> dict[str, jax.Array]:
    return {parameter_name(path): p for path, p in jax.tree_util.tree_leaves_with_path(model)}


def change(model: Transformer, rule: Callable[[str, jax.Array], jax.Array]) -> Transformer:
    """The model with `rule(name, p)` in place of each parameter."""
    return jax.tree_util.tree_map_with_path(lambda path, p: rule(parameter_name(path), p), model)


def shapes(config: ModelConfig) -> Transformer:
    return jax.eval_shape(lambda: Transformer(config, jax.random.key(0)))


def loud(config: ModelConfig, seed: int = 0) -> Transformer:
    """A model whose every parameter matters: as drawn, attention is nearly flat, biases are 0 and scales are 1."""
    rng = np.random.default_rng(seed)
    spread = {"kernel": 0.2, "bias": 0.2, "scale": 0.2, "token_embedding": 1.0, "unembedding": 0.3}

    def draw(name: str, p: jax.Array) -> jax.Array:
        last = name.rsplit(".", 1)[-1]
        return jnp.asarray((last == "scale") + spread.get(last, 0.5) * rng.standard_normal(p.shape), p.dtype)

    return change(shapes(config), draw)


def tokens_of(seed: int = 0, shape: tuple[int, int] = (B, T)) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, V, shape), jnp.int32)


def run_logits(model: Transformer, tokens_BT: jax.Array, **options: Any) -> jax.Array:
    return model.logits(model(tokens_BT, **options)[0])


# What a token sees


@jax.jit
def jacobian(model: Transformer, tokens_BT: jax.Array, options: dict[str, jax.Array]) -> jax.Array:
    """Of one number for each token's logits, by the embedding table: [T, V, D]."""
    pull_V = jax.random.normal(jax.random.key(0), V)

    def outputs(table_VD: jax.Array) -> jax.Array:
        embedded = change(model, lambda name, p: table_VD if name == "token_embedding" else p)
        return run_logits(embedded, tokens_BT, **options)[0] @ pull_V

    return jax.jacrev(outputs)(parameters(model)["token_embedding"])


def influence(model: Transformer, **options: jax.Array) -> np.ndarray:
    """[T, S]: how strongly the logits at t depend on the embedding of token s.

    All tokens differ, so that a row of the embedding belongs to one place; the output has a table of its own.
    """
    assert not model.config.tie_embeddings
    tokens_BT = jnp.arange(T, dtype=jnp.int32)[None] + 7
    return np.abs(jacobian(model, tokens_BT, options)[:, 7 : 7 + T]).max(-1)


def within(window: int) -> np.ndarray:
    back = np.arange(T)[:, None] - np.arange(T)
    return (back >= 0) & (back < window)


PACKED = {  # documents of 5 and 4 tokens, then padding
    "segments_BT": jnp.array([[1] * 5 + [2] * 4 + [0] * 3]),
    "positions_BT": jnp.array([[*range(5), *range(4), 0, 0, 0]]),
}


@pytest.mark.parametrize("name", ["gpt2", "llama", "no-positions"])
def test_no_token_sees_a_later_one_or_another_document(name: str) -> None:
    model = loud(tiny(**VARIANTS[name] | dict(tie_embeddings=False, windows=())))
    alone = dict(segments_BT=jnp.ones((1, T), int), positions_BT=jnp.arange(T)[None])
    np.testing.assert_array_equal(influence(model, **alone) > 0, within(T))
    seen, segments = influence(model, **PACKED), np.asarray(PACKED["segments_BT"][0])
    same = segments[:, None] == segments
    assert not seen[~same].any()
    np.testing.assert_array_equal(seen[:9] > 0, (same & within(T))[:9])


@pytest.mark.parametrize(("windows", "scan_layers"), [((3,), True), ((4, 0, 1), True), ((4, 0, 1), False)])
def test_each_layer_keeps_to_its_window(windows: tuple[int, ...], scan_layers: bool) -> None:
    """A window w sees exactly w keys: measured with the attention of all other layers silenced."""
    config = tiny(n_layers=3, windows=windows, scan_layers=scan_layers, tie_embeddings=False)
    model, pattern = loud(config), [windows[i % len(windows)] for i in range(3)]
    reach = 1 + sum((window or T) - 1 for window in pattern)
    np.testing.assert_array_equal(influence(model) > 0, within(min(reach, T)))
    for i in range(3):
        others = np.arange(3) != i
        silence = lambda name, p, others=others: p.at[others].set(0) if ".attention.output" in name else p  # noqa: E731
        np.testing.assert_array_equal(influence(change(model, silence)) > 0, within(pattern[i] or T))


# Every path computes the same


def reference(model: Transformer, tokens_BT: np.ndarray) -> np.ndarray:
    """The network once more, plainly, in float64: logits [B, T, V]."""
    c, p = model.config, {name: np.asarray(a, np.float64) for name, a in parameters(model).items()}
    places = np.arange(tokens_BT.shape[1])

    def angles(width: int, theta: float) -> np.ndarray:
        return places[:, None] * theta ** (-2 * np.arange(width // 2) / width)

    def norm(x: np.ndarray, name: str, kind: str, layer: Any) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True) if kind == "layernorm" else x
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_epsilon) * p[f"{name}.scale"][layer]
        return x + p[f"{name}.bias"][layer] if f"{name}.bias" in p else x

    def project(equation: str, x: np.ndarray, name: str, layer: int) -> np.ndarray:
        y = np.einsum(equation, x, p[f"layers.{name}.kernel"][layer])
        return y + p[f"layers.{name}.bias"][layer] if f"layers.{name}.bias" in p else y

    def turn(x_BTHK: np.ndarray) -> np.ndarray:
        z = x_BTHK[..., : c.key_dim // 2] + 1j * x_BTHK[..., c.key_dim // 2 :]
        z = z * np.exp(1j * angles(c.key_dim, c.rope_theta))[:, None]
        return np.concatenate([z.real, z.imag], -1)

    def attend(x: np.ndarray, layer: int) -> np.ndarray:
        q, k, v = (project("btd,dhk->bthk", x, f"attention.{name}", layer) for name in ("query", "key", "value"))
        if c.qk_norm != "none":
            q = norm(q, "layers.attention.query_norm", "rmsnorm", layer)
            k = norm(k, "layers.attention.key_norm", "rmsnorm", layer)
        if c.positions == "rotary":
            q, k = turn(q), turn(k)
        k, v = (np.repeat(a, c.n_heads // c.kv_heads, axis=2) for a in (k, v))
        scores = np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(c.key_dim)
        if c.attention_softcap is not None:
            scores = c.attention_softcap * np.tanh(scores / c.attention_softcap)
        back, window = places[:, None] - places, c.layer_windows[layer]
        weights = np.exp(scores) * ((back >= 0) & ((back < window) | (window == 0)))
        mixed = np.einsum("bhts,bshk->bthk", weights / weights.sum(-1, keepdims=True), v)
        return project("bthk,hkd->btd", mixed, "attention.output", layer)

    def feed_forward(x: np.ndarray, layer: int) -> np.ndarray:
        up = project("btd,df->btf", x, "mlp.up", layer)
        into = project("btd,df->btf", x, "mlp.gate", layer) if c.gated_mlp else up
        tanh_form = np.tanh(np.sqrt(2 / np.pi) * (into + 0.044715 * into**3))
        hidden = {
            "gelu": into * (1 + np.vectorize(math.erf)(into / np.sqrt(2))) / 2,
            "gelu_tanh": into * (1 + tanh_form) / 2,
            "silu": into / (1 + np.exp(-into)),
            "relu": np.maximum(into, 0),
        }[c.activation]
        return project("btf,fd->btd", hidden * up if c.gated_mlp else hidden, "mlp.down", layer)

    x = p["token_embedding"][tokens_BT] * (np.sqrt(c.d_model) if c.scale_embeddings else 1)
    if c.positions == "learned":
        x = x + p["position_embedding"][places]
    if c.positions == "sinusoidal":
        x = x + np.concatenate([np.sin(angles(c.d_model, 1e4)), np.cos(angles(c.d_model, 1e4))], -1)
    for layer in range(c.n_layers):
        for part, f in (("attention", attend), ("mlp", feed_forward)):
            normed = lambda x, part=part, layer=layer: norm(x, f"layers.{part}_norm", c.norm, layer)  # noqa: E731
            x = x + f(normed(x), layer) if c.norm_position == "pre" else normed(x + f(x, layer))
    x = norm(x, "final_norm", c.norm, ...) if c.norm_position == "pre" else x
    logits = x @ p["token_embedding" if c.tie_embeddings else "unembedding"][: c.vocab_size].T
    return logits if c.logit_softcap is None else c.logit_softcap * np.tanh(logits / c.logit_softcap)


def used_cache(config: ModelConfig, length: int) -> Cache:
    """A cache full of what another sequence left behind."""
    return jax.tree.map(lambda a: a + 7, new_cache(config, B, length))


def at(begin: int, end: int) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(begin, end, dtype=jnp.int32), (B, end - begin))


@jax.jit
def every_way(model: Transformer, tokens_BT: jax.Array) -> dict[str, jax.Array]:
    """Logits of all tokens: in one go, and with a cache in pieces."""
    half, decoder = T // 2, model.unstacked()
    first, cache, _ = decoder(tokens_BT[:, :half], positions_BT=at(0, half), cache=used_cache(model.config, T + 3))
    rest, *_ = decoder(tokens_BT[:, half:], positions_BT=at(half, T), cache=cache)

    def one_token(carry: tuple[Cache, jax.Array], token_B: jax.Array) -> tuple:
        cache, position = carry
        where_BT = jnp.full((B, 1), position)
        x_BTD, cache, _ = decoder(token_B[:, None], positions_BT=where_BT, cache=cache)
        return (cache, position + 1), x_BTD[:, 0]

    _, steps_TBD = jax.lax.scan(one_token, (cache, jnp.int32(half)), tokens_BT[:, half:].T)
    hidden = {
        "full": model(tokens_BT)[0],
        "two prefills": jnp.concatenate([first, rest], 1),
        "token by token": jnp.concatenate([first, jnp.moveaxis(steps_TBD, 0, 1)], 1),
    }
    return {name: model.logits(x_BTD) for name, x_BTD in hidden.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_matches_a_plain_reference_and_its_cached_decoding(name: str) -> None:
    """Also shows that no option is accepted and ignored: the reference honours each."""
    config = tiny(**VARIANTS[name])
    model, tokens_BT = loud(config), tokens_of()
    ways, expected = every_way(model, tokens_BT), reference(model, np.asarray(tokens_BT))
    assert expected.std() > 0.3
    exact = config.dtype == "float32"
    for way, logits_BTV in ways.items():
        assert logits_BTV.dtype == jnp.float32
        error = np.abs(logits_BTV - expected).max() / expected.std()
        assert error < (2e-5 if exact else 0.15), f"{way}: {error}"
        difference = np.abs(logits_BTV - ways["full"]).max() / expected.std()
        assert difference < (2e-5 if exact else 0.05), f"{way}: {difference}"


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma"])
def test_packed_documents_read_as_if_alone(name: str) -> None:
    model, tokens_BT = loud(tiny(**VARIANTS[name])), tokens_of(shape=(1, T))
    together = jax.jit(run_logits)(model, tokens_BT, **PACKED)
    for begin, end in [(0, 5), (5, 9)]:
        alone = reference(model, np.asarray(tokens_BT[:, begin:end]))
        np.testing.assert_allclose(together[:, begin:end], alone, rtol=0, atol=2e-5 * alone.std())


def test_rows_of_a_cache_stand_at_different_positions() -> None:
    """Row 1's prompt is two tokens shorter: its padding's slots are overwritten before any token sees them."""
    model, tokens_BT = loud(tiny(windows=(4, 0))), tokens_of()
    expected = reference(model, np.asarray(tokens_BT))
    run, starts_B1 = jax.jit(Transformer.__call__), jnp.array([[6], [4]])
    _, cache, _ = run(model, tokens_BT[:, :6], cache=used_cache(model.config, T))
    for step in range(6):
        positions_BT = starts_B1 + step
        now_BT = jnp.take_along_axis(tokens_BT, positions_BT, 1)
        x_BTD, cache, _ = run(model, now_BT, positions_BT=positions_BT, cache=cache)
        for row, position in enumerate(positions_BT[:, 0].tolist()):
            got = model.logits(x_BTD)[row, 0]
            np.testing.assert_allclose(got, expected[row, position], rtol=0, atol=2e-5 * expected.std())


def test_a_position_beyond_the_cache_is_not_written() -> None:
    """Nor moved to the last slot: that keeps what belongs there, as in a longer cache."""
    model, run = loud(tiny()), jax.jit(Transformer.__call__)
    given = dict(tokens_BT=tokens_of(shape=(B, 3)), positions_BT=at(3, 6))
    _, short, _ = run(model, **given, cache=used_cache(model.config, 4))
    _, long, _ = run(model, **given, cache=used_cache(model.config, 8))
    for one, other in zip(jax.tree.leaves(short), jax.tree.leaves(long), strict=True):
        np.testing.assert_allclose(one, other[:, :4], rtol=1e-5, atol=1e-5)
        assert (one[:, :3] == 7).all() and (one[:, 3] != 7).all()


@pytest.mark.parametrize("option", [dict(segments_BT=at(0, 3)), dict(dropout_key=jax.random.key(0))])
def test_a_cache_refuses_what_it_cannot_honour(option: dict[str, jax.Array]) -> None:
    model = shapes(tiny())
    with pytest.raises(ValueError, match="no segments, no dropout"):
        jax.eval_shape(lambda m: m(tokens_of(shape=(B, 3)), cache=new_cache(m.config, B, 3), **option), model)


def loss_and_gradients(model: Transformer) -> tuple[jax.Array, Transformer]:
    """With packing and dropout."""

    def loss(model: Transformer) -> jax.Array:
        return jnp.square(run_logits(model, tokens_of(shape=(1, T)), **PACKED, dropout_key=jax.random.key(1))).mean()

    return jax.value_and_grad(loss)(model)


@pytest.mark.slow
def test_scan_and_recomputation_change_no_value_and_no_gradient() -> None:
    config = tiny(**VARIANTS["llama"] | dict(windows=(4, 0), dropout=0.2))
    value, gradients = jax.jit(loss_and_gradients)(loud(config))
    for options in (dict(remat="dots"), dict(remat="full", scan_layers=False)):
        other, other_gradients = jax.jit(loss_and_gradients)(loud(dataclasses.replace(config, **options)))
        np.testing.assert_allclose(other, value, rtol=1e-5)
        for name, gradient in parameters(gradients).items():
            bound = 1e-5 * np.abs(gradient).max()
            np.testing.assert_allclose(parameters(other_gradients)[name], gradient, rtol=0, atol=bound, err_msg=name)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_recomputation_is_what_was_asked_for(scan_layers: bool) -> None:
    """Counted in matrix products: `dots` repeats those of attention, `full` those of the projections too."""
    products = {}
    for remat in ("none", "dots", "full"):
        model = loud(tiny(**VARIANTS["llama"] | dict(n_layers=1, remat=remat, scan_layers=scan_layers)))
        products[remat] = str(jax.make_jaxpr(loss_and_gradients)(model)).count("dot_general[")
    assert products["none"] < products["dots"] < products["full"]


def test_bfloat16_gradients_add_up_many_tokens() -> None:
    """A gradient that is a sum over 4096 tokens, of a bias or a frequent token, keeps bfloat16's two digits."""
    tokens_BT = jnp.where(tokens_of(1, (64, 64)) < V // 2, 7, tokens_of(2, (64, 64)))
    gradients = []
    for dtype in ("float32", "bfloat16"):
        model = loud(tiny(n_layers=1, context_length=64, dtype=dtype))
        gradients.append(jax.jit(jax.grad(lambda model: jnp.square(run_logits(model, tokens_BT)).mean()))(model))
    exact, rounded = map(parameters, gradients)
    for name, gradient in exact.items():
        if name != "layers.attention.key.bias":  # 0 but for rounding: it moves all scores of a query alike
            error = np.linalg.norm(rounded[name] - gradient) / np.linalg.norm(gradient)
            assert error < 0.02, f"{name}: {error}"


@pytest.mark.slow
def test_unstacked_layers_are_the_same_model() -> None:
    model, tokens_BT = loud(tiny(n_layers=3, windows=(4, 0))), tokens_of()
    split = model.unstacked()
    assert isinstance(split.layers, tuple) and len(split.layers) == 3 and not isinstance(model.layers, tuple)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *split.layers)
    for one, other in zip(jax.tree.leaves(stacked), jax.tree.leaves(model.layers), strict=True):
        np.testing.assert_array_equal(one, other)
    run = jax.jit(run_logits)
    np.testing.assert_allclose(run(split, tokens_BT), run(model, tokens_BT), rtol=1e-5, atol=1e-5)


# Rotary positions


def test_rotary_positions_are_relative() -> None:
    model, tokens_BT = loud(tiny(**VARIANTS["llama"])), tokens_of()
    run = jax.jit(run_logits)
    there, shifted = (run(model, tokens_BT, positions_BT=at(begin, begin + T)) for begin in (0, 1000))
    np.testing.assert_allclose(shifted, there, rtol=0, atol=1e-3)  # float32 angles near 1000 are exact to 6e-5
    stretched = run(model, tokens_BT, positions_BT=2 * at(0, T))
    assert np.abs(stretched - there).max() > 0.1


def test_rotation_keeps_lengths_and_starts_from_none() -> None:
    x_BTHK = jax.random.normal(jax.random.key(0), (B, T, 3, 8))
    config = tiny(positions="rotary", head_dim=8, rope_theta=100.0)
    cos, sin = rotations_of(config, at(0, T), T)[0]
    turned = jax.jit(rotate)(x_BTHK, (cos[0], sin[0]))
    np.testing.assert_array_equal(turned[:, 0], x_BTHK[:, 0])
    lengths = [np.linalg.norm(np.reshape(a, (B, T, 3, 2, 4)), axis=3) for a in (turned, x_BTHK)]
    np.testing.assert_allclose(lengths[0], lengths[1], rtol=1e-5)
    assert (np.abs(turned - x_BTHK)[:, 1:].max(-1) > 0.1).all()


# Dropout


def test_dropout_zeroes_its_share_and_keeps_the_mean() -> None:
    x_BTD = jnp.ones((100, 100, 10))
    dropped = jax.jit(dropout, static_argnums=1)(x_BTD, 0.3, jax.random.key(0))
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(1) / np.float32(0.7)}
    assert float((dropped == 0).mean()) == pytest.approx(0.3, abs=0.006)  # four standard deviations
    assert float(dropped.mean()) == pytest.approx(1, abs=0.009)
    assert dropout(x_BTD, 0.3, None) is x_BTD and dropout(x_BTD, 0.0, jax.random.key(0)) is x_BTD


def test_dropout_needs_a_key_and_draws_anew_in_every_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for the embeddings and twice in each layer, each with a key of its own."""
    model, tokens_BT = loud(tiny(dropout=0.5, scan_layers=False)), tokens_of()
    keys: list[bytes] = []

    def recorded(x_BTD: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
        keys.append(b"" if key is None else jax.random.key_data(key).tobytes())
        assert rate == 0.5
        return dropout(x_BTD, rate, key)

    for module in (layers, transformer):
        monkeypatch.setattr(module, "dropout", recorded)
    without = run_logits(model, tokens_BT)
    assert keys == [b""] * 5
    np.testing.assert_allclose(without, reference(model, np.asarray(tokens_BT)), rtol=0, atol=1e-4)
    keys.clear()
    seen = [run_logits(model, tokens_BT, dropout_key=jax.random.key(seed)) for seed in (0, 1)]
    assert len(set(keys)) == 10
    assert np.abs(seen[0] - seen[1]).max() > 0.1 and np.abs(seen[0] - without).max() > 0.1


# Initialisation


@pytest.mark.parametrize(("init", "positions_std"), [("gpt2", 0.01), ("nanogpt", 0.02)])
def test_parameters_start_as_published(init: str, positions_std: float) -> None:
    config = tiny(n_layers=3, d_model=64, context_length=256, init=init, qk_norm="head", gated_mlp=True)
    config = dataclasses.replace(config, tie_embeddings=False)
    drawn = parameters(Transformer(config, jax.random.key(0)))
    kinds = {"token_embedding": 0.02, "unembedding": 0.02, "position_embedding": positions_std}
    for name, p in drawn.items():
        if name.endswith((".scale", ".bias")):
            assert (p == (1 if name.endswith(".scale") else 0)).all(), name
            continue
        into_residual = name in ("layers.attention.output.kernel", "layers.mlp.down.kernel")
        std = kinds.get(name, 0.02 / math.sqrt(2 * 3) if into_residual else 0.02)
        for part in p if name.startswith("layers") else [p]:  # each layer draws for itself
            assert float(part.std()) == pytest.approx(std, rel=4 / math.sqrt(2 * part.size)), name
            assert abs(float(part.mean())) < 4 * std / math.sqrt(part.size), name
        assert len(np.unique(p)) > 0.9 * p.size, f"{name}: layers repeat one another"


def test_the_smallest_gpt2_has_its_published_number_of_parameters() -> None:
    assert parameter_count(shapes(ModelConfig(vocab_size=50257))) == 124_439_808
    untied = ModelConfig(vocab_size=50257, tie_embeddings=False)
    assert parameter_count(shapes(untied)) == 124_439_808 + 50257 * 768


def test_the_vocabulary_must_be_known() -> None:
    with pytest.raises(ValueError, match="vocab_size is not set"):
        Transformer(tiny(vocab_size=None), jax.random.key(0))


@pytest.mark.parametrize("gated", [False, True])
def test_a_layer_keeps_for_its_gradient_what_its_products_need(gated: bool) -> None:
    """What norms and activations are made of on the way is made again: half of a layer's memory was that."""
    config, x_BTD = tiny(gated_mlp=gated, d_ff=40, n_layers=1), jnp.ones((B, T, 32))
    up_gate_and_product = 3 if gated else 2
    for part, wide in ((layers.FeedForward(config, nnx.Rngs(0)), up_gate_and_product), (layers.Norm("D", config), 0)):
        _, pull = jax.vjp(lambda part, x_BTD: jax.tree.leaves(part(x_BTD)), part, x_BTD)
        kept = [leaf.shape for leaf in jax.tree.leaves(pull)]
        assert kept.count((B, T, 40)) == wide and kept.count((B, T, 32)) == 1 and kept.count((B, T, 1)) == 0
