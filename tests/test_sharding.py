"""Parameters are born cut as the table says, and what cannot be cut is refused with the numbers."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from jaxgpt.config import MeshConfig, ModelConfig, OptimizerConfig, TrainConfig, TrainingConfig
from jaxgpt.data.loader import Batch
from jaxgpt.errors import ConfigError
from jaxgpt.model import Transformer, parameter_name
from jaxgpt.sharding import (
    PARAMETER,
    batch_parts,
    check_divides,
    make_mesh,
    out_sharding,
    place,
    place_shapes,
    shard,
)
from jaxgpt.training.step import TrainState, init_state, make_train_step

MODEL = ModelConfig(
    n_layers=2, d_model=16, n_heads=4, n_kv_heads=2, d_ff=24, context_length=8, vocab_size=50, gated_mlp=True,
    qk_norm="head", tie_embeddings=False,
)  # fmt: skip

HEADS_IN, HEADS_OUT, HEADS_BIAS = (None, "fsdp", "tensor"), (None, "tensor", None, "fsdp"), (None, "tensor")
LAYOUT = {
    "token_embedding": ("tensor", "fsdp"),
    "unembedding": ("tensor", "fsdp"),
    "position_embedding": (None, "fsdp"),
    "final_norm.scale": ("fsdp",),
    "final_norm.bias": ("fsdp",),
    "layers.attention_norm.scale": (None, "fsdp"),
    "layers.attention_norm.bias": (None, "fsdp"),
    "layers.attention.query.kernel": HEADS_IN,
    "layers.attention.query.bias": HEADS_BIAS,
    "layers.attention.key.kernel": HEADS_IN,
    "layers.attention.key.bias": HEADS_BIAS,
    "layers.attention.value.kernel": HEADS_IN,
    "layers.attention.value.bias": HEADS_BIAS,
    "layers.attention.output.kernel": HEADS_OUT,
    "layers.attention.output.bias": (None, "fsdp"),
    "layers.attention.query_norm.scale": (),
    "layers.attention.key_norm.scale": (),
    "layers.mlp_norm.scale": (None, "fsdp"),
    "layers.mlp_norm.bias": (None, "fsdp"),
    "layers.mlp.up.kernel": (None, "fsdp", "tensor"),
    "layers.mlp.up.bias": (None, "tensor"),
    "layers.mlp.gate.kernel": (None, "fsdp", "tensor"),
    "layers.mlp.gate.bias": (None, "tensor"),
    "layers.mlp.down.kernel": (None, "tensor", "fsdp"),
    "layers.mlp.down.bias": (None, "fsdp"),
}


@pytest.mark.slow
def test_the_state_is_born_cut(mesh_of: Callable) -> None:
    """Parameters and both moments of Adam; of a matrix no device holds more than its quarter."""
    config = TrainConfig(model=MODEL, optimizer=OptimizerConfig(ema_decay=0.9))
    with mesh_of(data=2, fsdp=2, tensor=2):
        state: TrainState = jax.jit(init_state, static_argnums=0)(config)
        target = place_shapes(jax.eval_shape(lambda: init_state(config)))
    moments = state.optimizer[1]
    for tree in (state.model, state.raw_model, moments.mu, moments.nu):
        leaves = {parameter_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        assert leaves.keys() == LAYOUT.keys()
        for name, leaf in leaves.items():
            axes = LAYOUT[name] + (None,) * (leaf.ndim - len(LAYOUT[name]))
            assert leaf.sharding.spec == jax.P(*axes), name
            pieces = 2 ** sum(axis is not None for axis in axes)
            assert {piece.data.size for piece in leaf.addressable_shards} == {leaf.size // pieces}, name
            if name.endswith(("kernel", "token_embedding", "unembedding")):
                assert pieces == 4, name
    for leaf, shape in zip(jax.tree.leaves(state), jax.tree.leaves(target), strict=True):
        assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim) and leaf.shape == shape.shape


def test_a_step_keeps_the_cut_of_every_kind_of_parameter(mesh_of: Callable) -> None:
    """By tracing: sharding is in the types, and JAX raises where it is ambiguous."""
    config = TrainConfig(model=MODEL, training=TrainingConfig(batch_size=8, accumulation_steps=2))
    with mesh_of(data=2, fsdp=2, tensor=2):
        before = jax.eval_shape(lambda: init_state(config))
        batch = place(Batch(*np.ones((4, 8, 8), np.int32)), "BT")
        after, _ = jax.eval_shape(make_train_step(config), before, batch)
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
        assert old.sharding == new.sharding or old.ndim == 0, jax.tree_util.keystr(path)


def test_a_batch_is_cut_into_rows(mesh_of: Callable) -> None:
    rows = np.arange(32, dtype=np.int32).reshape(8, 4)
    with mesh_of(data=2, fsdp=2, tensor=2):
        placed = place({"tokens": rows}, "BT")["tokens"]
        assert batch_parts() == 4
    np.testing.assert_array_equal(placed, rows)
    begins = [piece.index[0].start or 0 for piece in placed.addressable_shards]
    assert sorted(begins) == [0, 0, 2, 2, 4, 4, 6, 6]


def test_a_model_without_a_mesh_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^no mesh is set: use `with jax.set_mesh\("):
        check_divides(jax.sharding.get_mesh(), MODEL)


def test_without_a_mesh_nothing_is_cut() -> None:
    x = jnp.ones((4, 2))
    assert shard(x, "BD") is x and out_sharding("BD", PARAMETER) is None and out_sharding("BD") is None


@pytest.mark.parametrize(
    ("sizes", "devices", "shape"),
    [
        ((-1, 1, 1), 8, (8, 1, 1)),
        ((-1, 2, 2), 8, (2, 2, 2)),
        ((2, -1, 2), 8, (2, 2, 2)),
        ((1, 2, -1), 8, (1, 2, 4)),
        ((-1, 1, 1), 1, (1, 1, 1)),
        ((1, 3, 1), 3, (1, 3, 1)),
    ],
)
def test_a_mesh_takes_the_devices_it_is_given(
    sizes: tuple[int, int, int], devices: int, shape: tuple[int, int, int]
) -> None:
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:devices])
    assert tuple(mesh.shape.items()) == tuple(zip(("data", "fsdp", "tensor"), shape, strict=True))
    assert mesh.axis_types == (AxisType.Explicit,) * 3
    assert set(mesh.devices.flat) == set(jax.devices()[:devices])


@pytest.mark.parametrize("sizes", [(3, 1, 1), (2, 2, 1), (16, 1, 1), (-1, 3, 1), (-1, 16, 1), (4, 4, -1)])
def test_a_mesh_that_does_not_fit_is_refused(sizes: tuple[int, int, int]) -> None:
    asked = "data {} x fsdp {} x tensor {}".format(*sizes)
    with pytest.raises(ConfigError, match=f"^mesh {asked} does not fit 8 devices; make the sizes multiply to 8$"):
        make_mesh(MeshConfig(*sizes))


@pytest.mark.parametrize(
    ("changes", "sizes", "message"),
    [
        ({}, (1, 1, 4), "model.n_kv_heads 2 does not divide over mesh.tensor 4"),
        (dict(n_heads=6, n_kv_heads=6, head_dim=4), (1, 1, 4), "model.n_heads 6 does not divide over mesh.tensor 4"),
        (dict(d_ff=25), (1, 1, 2), "model.d_ff 25 does not divide over mesh.tensor 2"),
        (dict(d_model=20), (1, 8, 1), "model.d_model 20 does not divide over mesh.fsdp 8"),
        (
            dict(n_heads=3, n_kv_heads=3, head_dim=4),
            (1, 1, 3),
            r"vocabulary rows \(multiples of 128\) 128 does not divide over mesh.tensor 3",
        ),
        ({}, (4, 2, 1), r"sequences at a time 12 does not divide over mesh.data \* mesh.fsdp 8"),
    ],
)
def test_what_does_not_divide_is_refused(changes: dict, sizes: tuple[int, int, int], message: str) -> None:
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    with pytest.raises(ConfigError, match=f"^{message}; change one of them$"):
        check_divides(mesh, dataclasses.replace(MODEL, **changes), batch_size=12)


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [({}, (1, 1, 2)), ({}, (2, 4, 1)), ({}, (2, 2, 2)), (dict(n_heads=3, n_kv_heads=3, vocab_size=300), (1, 1, 3))],
)
def test_what_divides_can_be_made(changes: dict, sizes: tuple[int, int, int]) -> None:
    """What passes the check does not fail later, in JAX's words."""
    model = dataclasses.replace(MODEL, **({"head_dim": 4} | changes))
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    check_divides(mesh, model, batch_size=12 if sizes[0] == 1 else 8)
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: init_state(TrainConfig(model=model)).model)
    assert all(isinstance(leaf.sharding, NamedSharding) for leaf in jax.tree.leaves(shapes))


def test_parameters_are_drawn_in_parts(mesh_of: Callable) -> None:
    """A tensor that is drawn whole on every device before it is cut ends the life of large models."""
    model = ModelConfig(n_layers=4, d_model=256, n_heads=4, context_length=32, vocab_size=4096)
    with mesh_of(fsdp=8):
        draw = jax.jit(lambda: Transformer(model, jax.random.key(0))).lower().compile()
        memory = draw.memory_analysis()
        assert memory.temp_size_in_bytes < 1.5 * memory.output_size_in_bytes
        in_parts = draw()
    with mesh_of():
        whole = jax.jit(lambda: Transformer(model, jax.random.key(0)))()
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(in_parts), jax.tree.leaves(whole), strict=True))


def test_gathered_weights_are_not_kept_for_the_backward_pass(mesh_of: Callable) -> None:
    """Those of all layers together are the whole model."""
    model = ModelConfig(n_layers=8, d_model=256, n_heads=4, context_length=16, vocab_size=128)
    with mesh_of(fsdp=8):
        abstract = place_shapes(jax.eval_shape(lambda: Transformer(model, jax.random.key(0))))
        tokens = place_shapes(jax.eval_shape(lambda: shard(jnp.zeros((8, 16), jnp.int32), "BT")))
        loss = lambda model, tokens: model(tokens)[0].sum()  # noqa: E731
        memory = jax.jit(jax.grad(loss)).lower(abstract, tokens).compile().memory_analysis()
    layer_bytes = 12 * 256**2 * 4
    assert memory.temp_size_in_bytes < 5 * layer_bytes  # 3.6 were measured, and 11.6 with all weights
