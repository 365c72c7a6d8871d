"""The presets: each loads and survives JSON; the large ones have their published size and are cut over their mesh.

Nothing of a large model is made: `jax.eval_shape` traces the first state on 8 simulated devices.
"""

import math
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from jaxgpt.config import MeshConfig, TrainConfig, load_preset, to_json
from jaxgpt.errors import ConfigError
from jaxgpt.model import parameter_count, parameter_name
from jaxgpt.run import with_vocabulary
from jaxgpt.sharding import check_divides, make_mesh, place_shapes
from jaxgpt.training.step import TrainState, init_state

ROOT = Path(__file__).parents[1]
PRESETS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
PARAMETERS = {
    "gpt2_124m": 124_439_808,
    "gpt2_xl": 1_557_611_200,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
}
MILLION = 2**20


def configuration(preset: str) -> TrainConfig:
    """A preset with the vocabulary that training would fill in."""
    config = load_preset(f"configs/{preset}.py")
    return with_vocabulary(config, SimpleNamespace(vocab_size=config.tokenizer.vocab_size))


def abstract_state(config: TrainConfig, mesh: MeshConfig) -> TrainState:
    with jax.set_mesh(make_mesh(mesh)):
        return place_shapes(jax.eval_shape(lambda: init_state(config)))


def test_every_preset_is_known_here() -> None:
    assert {*PARAMETERS, "shakespeare", "tiny"} == set(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_loads_and_survives_json(preset: str, tmp_path: Path) -> None:
    config = load_preset(f"configs/{preset}.py")
    assert config.name == preset, "the name decides the run directory"
    saved = tmp_path / "config.json"
    saved.write_text(to_json(config), "utf-8")
    assert load_preset(str(saved)) == config


@pytest.mark.parametrize("preset", PRESETS)
def test_the_mesh_of_a_preset_cuts_it_evenly(preset: str) -> None:
    config = configuration(preset)
    rows = config.training.batch_size // config.training.accumulation_steps
    check_divides(make_mesh(config.mesh), config.model, rows)


@pytest.mark.parametrize(("preset", "count"), PARAMETERS.items())
def test_a_large_preset_has_its_published_size(preset: str, count: int) -> None:
    config = configuration(preset)
    assert parameter_count(abstract_state(config, config.mesh).model) == count


@pytest.mark.parametrize("sizes", [None, (1, 8, 1)], ids=["own", "fsdp"])
@pytest.mark.parametrize("preset", ["gpt2_xl", "llama3_8b", "llama3_70b"])
def test_nothing_large_is_on_every_device(preset: str, sizes: tuple[int, int, int] | None) -> None:
    """Of parameters and optimizer state alike: each device holds an eighth, and norms and biases."""
    config = configuration(preset)
    state = abstract_state(config, MeshConfig(*sizes) if sizes else config.mesh)
    whole, held = 0, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        here = math.prod(leaf.sharding.shard_shape(leaf.shape))
        whole, held = whole + leaf.size, held + here
        assert leaf.size <= MILLION or here == leaf.size / 8, parameter_name(path)
    assert held < 1.01 * whole / 8


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def config(): return ModelConfig(n_layer=3)", "argument 'n_layer'.*[Dd]id you mean '?n_layers"),
        ("def config(): return ModelConfig(n_heads=5)", "model.d_model 768 does not divide by model.n_heads 5"),
        ("def config(: pass", "SyntaxError: invalid syntax"),
        ("def config(): return 1 / 0", "ZeroDivisionError: division by zero; mend it, --debug shows where"),
        ("", r"must define a function config\(\) that returns a TrainConfig"),
    ],
)
def test_a_mistake_in_a_preset_is_one_line(tmp_path: Path, code: str, message: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(f"from jaxgpt.config import ModelConfig\n{code}\n")
    with pytest.raises(ConfigError, match=message) as caught:
        load_preset(str(path))
    assert "\n" not in str(caught.value)
