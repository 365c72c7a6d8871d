"""Cross-entropy of a linear output layer, without ever holding all the logits.

[tokens, vocabulary] logits are the largest array of a small model's step: 4096 x 50304 float32 take 0.8 GB, and
autodiff keeps them twice. Here the sequence is cut into chunks; each chunk's logits become its loss and, when
gradients are wanted, its part of them at once, and are dropped. No product is computed twice.

Letters: `jaxgpt/sharding.py`, and C chunks."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxgpt.kernels.matrix_first import matrix_first
from jaxgpt.sharding import out_sharding, shard


class LossOptions(NamedTuple):
    """Static choices: the true vocabulary size (rows of w beyond it are padding), soft-cap, z-loss weight, chunks."""

    vocab_size: int
    softcap: float | None = None
    z_loss: float = 0.0
    chunks: int = 1


def output_logits(x_BTD: Array, w_VD: Array, softcap: float | None, few_rows: bool = False) -> Array:
    """Capped float32 logits [B, T, V], of padding rows too; `few_rows` as `matrix_first` is good for."""
    if few_rows:
        logits_BTV = matrix_first(x_BTD, w_VD, "BTD", "VD", "BTV")
    else:
        where = out_sharding("BTV")
        logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, w_VD, preferred_element_type=jnp.float32, out_sharding=where)
    return logits_BTV if softcap is None else softcap * jnp.tanh(logits_BTV / softcap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def linear_cross_entropy(
    x_BTD: Array, w_VD: Array, labels_BT: Array, weights_BT: Array, options: LossOptions
) -> tuple[Array, Array]:
    """sum(weights * (nll + z_loss * log_z^2)) for logits x w^T, and the nll [B, T] in nats (for reports). Only the sum
    has gradients, and only for x and w. Labels of -1 must have weight 0; T must divide by `options.chunks`. The z-loss
    is that of arXiv:2204.02311, the soft-cap that of arXiv:2408.00118."""
    return _in_chunks(x_BTD, w_VD, labels_BT, weights_BT, options)[0]  # without gradients, jit leaves them out


def _in_chunks(
    x_BTD: Array, w_VD: Array, labels_BT: Array, weights_BT: Array, options: LossOptions
) -> tuple[tuple[Array, Array], tuple]:
    """Loss and, in the same pass over the logits, its gradients for a cotangent of one."""

    def chunk(carry: tuple, inputs: tuple) -> tuple[tuple, tuple]:
        (total, dw_VD), (x, labels, weights) = carry, inputs
        logits = output_logits(x, w_VD, options.softcap)
        if options.vocab_size < w_VD.shape[0]:
            real = jnp.arange(w_VD.shape[0]) < options.vocab_size
            logits = jnp.where(real[None, None], logits, jnp.finfo(jnp.float32).min)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        # A boolean one-hot, unlike a gather, stays local when V is cut over devices, and fuses.
        hit = labels[:, :, None] == jnp.arange(w_VD.shape[0], out_sharding=out_sharding("V"))[None, None]
        losses = jnp.where(labels >= 0, log_z - jnp.where(hit, logits, 0).sum(-1), 0)
        penalty = options.z_loss * jnp.square(log_z) if options.z_loss else 0.0
        total += (weights * (losses + penalty)).sum()
        pull = weights * (1 + 2 * options.z_loss * log_z)  # on the softmax, through log_z
        dlogits = jnp.exp(logits - log_z[..., None]) * pull[..., None] - jnp.where(hit, weights[..., None], 0)
        if options.softcap is not None:
            dlogits *= 1 - jnp.square(jnp.clip(logits / options.softcap, -1, 1))  # 0 at the padding rows' -1e38
        dlogits = dlogits.astype(x.dtype)
        dx = jnp.einsum("BTV,VD->BTD", dlogits, w_VD, out_sharding=out_sharding("BTD"))
        where = out_sharding("VD")
        dw_VD += jnp.einsum("BTV,BTD->VD", dlogits, x, preferred_element_type=jnp.float32, out_sharding=where)
        return (total, dw_VD), (losses, dx)

    def split(a: Array) -> Array:  # [B, T, ...] -> [C, B, T / C, ...]
        return jnp.moveaxis(a.reshape(a.shape[0], options.chunks, -1, *a.shape[2:]), 1, 0)

    def join(a: Array) -> Array:
        return jnp.moveaxis(a, 0, 1).reshape(*labels_BT.shape, *a.shape[3:])

    start = jnp.zeros(()), shard(jnp.zeros(w_VD.shape, jnp.float32), "VD")
    (total, dw_VD), parts = jax.lax.scan(chunk, start, tuple(map(split, (x_BTD, labels_BT, weights_BT))))
    losses_BT, dx_BTD = jax.tree.map(join, parts)
    return (total, losses_BT), (dx_BTD, dw_VD.astype(w_VD.dtype))


def _backward(options: LossOptions, saved: tuple, cotangents: tuple) -> tuple:
    dx_BTD, dw_VD = saved
    return (cotangents[0] * dx_BTD).astype(dx_BTD.dtype), (cotangents[0] * dw_VD).astype(dw_VD.dtype), None, None


linear_cross_entropy.defvjp(_in_chunks, _backward)
