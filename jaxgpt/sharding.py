"""One letter per axis, and the one table that says over which mesh axes each letter is cut.

Sharding is explicit: it lives in the type of every array, and JAX raises instead of guessing. There is always a mesh,
1x1x1 on a laptop. Letters, used in names such as `x_BTD` all over the project:

    B batch   T query length   S key length   D model width   H query heads   G key/value heads
    K head width   F feed-forward width   V vocabulary   L layers   E experts

Stored parameters are also cut along D over `fsdp` and gathered just before use (ZeRO-3, arXiv:1910.02054);
`tensor` cuts heads, feed-forward and vocabulary (Megatron, arXiv:1909.08053)."""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from jaxgpt.config import VOCAB_MULTIPLE, MeshConfig, ModelConfig
from jaxgpt.errors import require

PyTree = TypeVar("PyTree")

ACTIVATION = {"B": ("data", "fsdp"), "H": "tensor", "G": "tensor", "F": "tensor", "V": "tensor"}
PARAMETER = ACTIVATION | {"D": "fsdp"}


def out_sharding(axes: str, table: dict = ACTIVATION) -> jax.P | None:
    """The PartitionSpec of an activation, one letter per dimension, or None while no mesh is set. With the table
    PARAMETER where a stored parameter is born: as an activation, and along D over fsdp."""
    return None if jax.sharding.get_abstract_mesh().empty else jax.P(*map(table.get, axes))


def shard(x: Array, axes: str) -> Array:
    """Lay an activation, or a parameter about to be used, out as its letters say."""
    return x if (where := out_sharding(axes)) is None else jax.sharding.reshard(x, where)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes data, fsdp and tensor over all devices, or over as many of `devices`, from the first on, as the
    sizes ask for. Raises ConfigError when the sizes do not fit them."""
    sizes = [config.data, config.fsdp, config.tensor]
    if devices is not None and -1 not in sizes:
        devices = devices[: math.prod(sizes)]
    count = len(devices) if devices is not None else jax.device_count()
    if -1 in sizes:
        sizes[sizes.index(-1)] = count // abs(math.prod(sizes))
    asked = f"data {config.data} x fsdp {config.fsdp} x tensor {config.tensor}"
    require(math.prod(sizes) == count, f"mesh {asked} does not fit {count} devices; make the sizes multiply to {count}")
    # `jax.make_mesh` would refuse 8 x 8 on a 4x4x4 cube of v5p, where one axis of the cube must serve two of the mesh.
    layout = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(layout, ("data", "fsdp", "tensor"), (AxisType.Explicit,) * 3)


def check_divides(mesh: Mesh, model: ModelConfig, batch_size: int = 0) -> None:
    """Raise ConfigError when the mesh cannot cut this model or batch evenly, or when none is set."""
    require(not mesh.empty, "no mesh is set: use `with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.devices())):`")
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    cuts = [
        ("model.n_heads", model.n_heads, "mesh.tensor", tensor),
        ("model.n_kv_heads", model.kv_heads, "mesh.tensor", tensor),
        ("model.d_ff", model.ff_dim, "mesh.tensor", tensor),
        (f"vocabulary rows (multiples of {VOCAB_MULTIPLE})", model.vocab_rows, "mesh.tensor", tensor),
        ("model.d_model", model.d_model, "mesh.fsdp", fsdp),
        ("sequences at a time", batch_size, "mesh.data * mesh.fsdp", mesh.shape["data"] * fsdp),
    ]
    for name, size, axis, parts in cuts:
        require(size % parts == 0, f"{name} {size} does not divide over {axis} {parts}; change one of them")


def batch_parts() -> int:
    """Parts into which the current mesh cuts a batch."""
    return math.prod(jax.sharding.get_mesh().shape[axis] for axis in ACTIVATION["B"])


def place(tree: Any, axes: str) -> Any:
    """Put a tree of the host's arrays on the devices of the current mesh, cut as their letters say."""
    return jax.device_put(tree, out_sharding(axes))


def place_shapes(tree: PyTree) -> PyTree:
    """What `jax.eval_shape` gives, bound to the devices of the current mesh: a target to restore to or compile for."""
    mesh = jax.sharding.get_mesh()
    where = lambda leaf: NamedSharding(mesh, leaf.sharding.spec if leaf.sharding else jax.P())  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.update(sharding=where(leaf)), tree)
