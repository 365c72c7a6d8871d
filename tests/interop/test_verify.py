"""`verify` passes on what is right, and each of its checks fails on what it is for."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxgpt.config import ModelConfig
from jaxgpt.interop.verify import verify
from jaxgpt.kernels import attention
from jaxgpt.model import Transformer, layers, transformer

GEMMA_3 = dict(
    positions="rotary", norm="rmsnorm", norm_position="both", norm_plus_one=True, qk_norm="head", gated_mlp=True,
    attention_bias=False, mlp_bias=False, n_kv_heads=2, head_dim=16, windows=(6, 6, 0), local_rope_theta=100.0,
    scale_embeddings=True,
)  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gemma 3": GEMMA_3,
    "olmo 2, some layers without rotation": dict(
        positions="rotary", norm="rmsnorm", norm_position="output", qk_norm="all", rotary_layers=(True, False)
    ),
    "bfloat16": dict(positions="rotary", norm="rmsnorm", dtype="bfloat16"),
}


def model_of(**options: Any) -> Transformer:
    sizes = dict(n_layers=3, d_model=32, n_heads=4, context_length=64, vocab_size=97)
    model = jax.jit(lambda: Transformer(ModelConfig(**(sizes | options)), jax.random.key(0)))()
    return jax.tree.map(lambda p: p * 3 if p.ndim > 2 else p, model)  # so that attention is not all but even


def failed(model: Transformer) -> list[str]:
    jax.clear_caches()  # a function that is replaced below may be compiled already
    return [check.name for check in verify(model) if not check.passed]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_all_checks_hold(name: str, mesh_of: Callable) -> None:
    with mesh_of():
        checks = verify(model_of(**MODELS[name]))
    assert all(check.passed for check in checks), checks
    assert len(checks) == 5 + bool(MODELS[name].get("windows"))


@pytest.mark.slow
def test_all_checks_hold_on_a_mesh(mesh_of: Callable) -> None:
    with mesh_of(data=2, fsdp=2, tensor=2):
        assert not failed(model_of(**GEMMA_3))


@pytest.mark.parametrize(
    ("what", "fails"),
    [
        ("segments", ["packed documents do not leak"]),
        ("window", ["window of 6 is honoured"]),
        ("causality", ["cached decode == full forward", "prefill in chunks == whole", "the future is not seen"]),
    ],
)
def test_a_mask_that_leaves_something_out_is_found(
    what: str, fails: list[str], mesh_of: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = attention.attention_mask

    def careless(q_positions_BT: Any, k_positions_BS: Any, segments: Any = None, window: Any = 0) -> jax.Array:
        mask_BTS = right(
            q_positions_BT, k_positions_BS, None if what == "segments" else segments, 0 if what == "window" else window
        )
        if what == "causality":
            ahead_BTS = k_positions_BS[:, None, :] == q_positions_BT[:, :, None] + 1
            mask_BTS |= ahead_BTS & (k_positions_BS[:, None, :] < q_positions_BT.shape[1])
        return mask_BTS

    for module in (attention, transformer):
        monkeypatch.setattr(module, "attention_mask", careless)
    with mesh_of():
        assert set(fails) <= set(failed(model_of(**GEMMA_3)))


def test_a_cache_in_the_wrong_place_is_found(mesh_of: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    right = transformer.cached_attention

    def late(*qkv: Any, positions_BT: Any, **more: Any) -> Any:
        return right(*qkv, positions_BT=jnp.maximum(positions_BT, 1), **more)

    monkeypatch.setattr(transformer, "cached_attention", late)
    with mesh_of():
        assert "cached decode == full forward" in failed(model_of())


def test_rows_that_see_each_other_are_found(mesh_of: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    right = layers.FeedForward.__call__
    monkeypatch.setattr(
        layers.FeedForward, "__call__", lambda self, x: right(self, x + 0.05 * x.mean(0, keepdims=True))
    )
    with mesh_of():
        assert "batched == alone" in failed(model_of())


def test_what_is_not_a_number_fails(mesh_of: Callable) -> None:
    with mesh_of():
        model = jax.tree.map(lambda p: p * jnp.nan, model_of())
        assert "cached decode == full forward" in failed(model)
