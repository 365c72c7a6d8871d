"""A feed-forward network for each token's experts (arXiv:2101.03961, arXiv:2401.04088): no token is ever dropped.

Tokens are sorted by expert, so that each expert's are one group of rows of a ragged product. Under a mesh every device
sorts its own tokens and multiplies with its part of F; the parts are added up over `tensor`.
Letters: `jaxgpt/sharding.py`, M experts of a token, N = B T M rows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxgpt.sharding import out_sharding


def route(logits_BTE: Array, count: int, normalize: bool) -> tuple[Array, Array]:
    """Weights (that add up to 1, if `normalize`) and numbers of the `count` most probable experts, [B, T, M] each."""
    weights_BTM, experts_BTM = jax.lax.top_k(jax.nn.softmax(logits_BTE.astype(jnp.float32)), count)
    if normalize:
        weights_BTM /= weights_BTM.sum(-1, keepdims=True)
    return weights_BTM, experts_BTM


def mixture(
    x_BTD: Array, weights_BTM: Array, experts_BTM: Array, matrices: tuple[Array, Array, Array], activate: Callable
) -> Array:
    """The weighted sum [B, T, D] of each token's experts, down(activate(gate(x)) * up(x)). `matrices` are gate and up
    [E, D, F] and down [E, F, D], as they are cut for use: F over `tensor`, all else whole."""

    def local(x_BTD: Array, weights_BTM: Array, experts_BTM: Array, *matrices: Array) -> Array:
        gate_EDF, up_EDF, down_EFD = matrices
        experts_N = experts_BTM.ravel()
        order_N = jnp.argsort(experts_N, stable=True)
        sizes_E = jnp.bincount(experts_N, length=gate_EDF.shape[0]).astype(jnp.int32)
        token_N = order_N // experts_BTM.shape[-1]
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])[token_N]
        hidden = jax.checkpoint(lambda gate, up: activate(gate) * up)  # made again for the gradient
        hidden_NF = hidden(jax.lax.ragged_dot(x_ND, gate_EDF, sizes_E), jax.lax.ragged_dot(x_ND, up_EDF, sizes_E))
        y_ND = jax.lax.ragged_dot(hidden_NF, down_EFD, sizes_E).astype(jnp.float32)
        y_ND *= weights_BTM.ravel()[order_N][:, None]
        # Back to the tokens' order first: adding up M rows is the same on every run, a scatter may not be.
        unsorted_ND = y_ND[jnp.argsort(order_N)]
        return unsorted_ND.reshape(*experts_BTM.shape, -1).sum(2).astype(x_BTD.dtype)

    if (rows := out_sharding("BTD")) is None:
        return local(x_BTD, weights_BTM, experts_BTM, *matrices)
    specs = (rows, rows, rows, out_sharding("EDF"), out_sharding("EDF"), out_sharding("EFD"))
    cut = jax.shard_map(lambda *inputs: jax.lax.psum(local(*inputs), "tensor"), in_specs=specs, out_specs=rows)
    return cut(x_BTD, weights_BTM, experts_BTM, *matrices)


def router_losses(logits_BTE: Array, experts_BTM: Array) -> Array:
    """Float32 [2], over all tokens: the balance loss E * sum_e(share of e * mean probability of e) (arXiv:2101.03961,
    equation 4; a token's shares add up to M), and the mean squared log-partition (arXiv:2202.08906, equation 5)."""
    experts, logits_BTE = logits_BTE.shape[-1], logits_BTE.astype(jnp.float32)
    chosen_BTME = experts_BTM[..., None] == jnp.arange(experts)[None, None, None]
    share_E = chosen_BTME.sum(2).astype(jnp.float32).mean((0, 1))
    probability_E = jax.nn.softmax(logits_BTE).mean((0, 1))
    return jnp.stack([experts * (share_E * probability_E).sum(), jnp.square(jax.nn.logsumexp(logits_BTE, -1)).mean()])
