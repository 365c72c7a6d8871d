"""How much arithmetic a model needs, and how much a device can do: the two numbers behind MFU.

Model FLOPs utilisation (arXiv:2204.02311, appendix B) counts the operations that the mathematics needs, not those that
recomputation adds: two for each multiply-add of the forward pass and twice that for the backward pass."""

import functools
import timeit
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxgpt.config import ModelConfig

DEVICES: dict[str, dict[str, float]] = tomllib.loads(Path(__file__).with_name("devices.toml").read_text("utf-8"))


@functools.cache
def forward_flops_per_token(config: ModelConfig, prompt: int | None = None) -> float:
    """Operations of one token's forward pass, a mean over a full sequence: matrix products, and attention (scores, and
    means of values) over keys that the causal mask and the layer's window leave, whatever documents are packed. Or over
    a `prompt` of so many tokens, of which the last layer's keys and values are wanted, and no logits."""
    D, H, G, K = config.d_model, config.n_heads, config.kv_heads, config.key_dim
    mlp = D * config.ff_dim * (3 if config.gated_mlp else 2)
    if config.n_experts:  # those that a token is sent to, and the router
        mlp = config.experts_per_token * mlp + D * config.n_experts
    products, seen = D * K * (2 * H + 2 * G) + mlp, np.arange(1, (prompt or config.context_length) + 1)
    layers = [products + 2 * H * K * np.minimum(seen, window or seen).mean() for window in config.layer_windows]
    if prompt:
        return 2.0 * (sum(layers[:-1]) + D * K * 2 * G)
    return 2.0 * (sum(layers) + D * (config.vocab_size or 0))


def _best_seconds(*matrices: np.ndarray) -> float:
    """The best product of ten on one device: a processor's peak is not in its name. Takes 0.5 s."""
    with jax.set_mesh(Mesh(jax.local_devices()[:1], "x")):  # the current mesh may have more devices
        placed = [jax.device_put(matrix) for matrix in matrices]
        compiled = jax.jit(jnp.matmul).lower(*placed).compile()
    return min(timeit.repeat(lambda: compiled(*placed).block_until_ready(), number=1, repeat=10))


@functools.cache
def measured_flops(dtype: str = "float32") -> float:
    """Operations a second of a large matrix product on one device; on a CPU, of all its cores."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    return 2 * size**3 / _best_seconds(*[np.ones((size, size), jnp.dtype(dtype))] * 2)


@functools.cache
def measured_bandwidth() -> float:
    """Bytes a second that one device reads from its memory: of a matrix of 256 MiB, multiplied by a vector."""
    matrix = np.ones((1024, 2**16), np.float32)
    return matrix.nbytes / _best_seconds(np.ones((1, 1024), np.float32), matrix)


def peak_flops(mesh: Mesh) -> float | None:
    """Operations a second that all devices of the mesh could do at best; None for a device that is not in the table. On
    CPUs it is measured: simulated devices share the same cores."""
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return measured_flops() * jax.process_count()
    known = DEVICES.get(device.device_kind)
    return None if known is None else known["flops"] * mesh.size
