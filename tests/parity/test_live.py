"""The comparisons of `test_reference.py`, made live with PyTorch and transformers over more kinds of model."""

import functools
from collections.abc import Callable

import comparison
import numpy as np
import pytest
from comparison import RECORDED, Case, gpt2, llama

pytestmark = pytest.mark.parity

MODELS = [
    gpt2("gpt2-gelu-untied", activation="gelu", tie_embeddings=False),
    gpt2("gpt2-relu", dict(epsilon=1e-3, clip_norm=0.0), activation="relu", norm_epsilon=0.1, n_heads=2, d_ff=40),
    llama("llama-tied-multi-query", tie_embeddings=True, n_kv_heads=1, head_dim=6, norm_epsilon=0.1),
    llama("llama-gelu-biases", dict(clip_norm=1.5), activation="gelu", attention_bias=True, mlp_bias=True),
    llama("llama-multi-head-long", n_kv_heads=None, context_length=256, rope_theta=10_000.0),
]
TRAINED = [*MODELS[1:4], gpt2("gpt2-in-two-parts", accumulation_steps=2)]


@functools.cache
def live(case: Case) -> comparison.Reference:
    from make_reference import make_reference  # here, because it imports packages that may not be there

    return make_reference(case)


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
@pytest.mark.parametrize("kind", ["whole", "packed"])
def test_logits_and_gradients(case: Case, kind: str, mesh_of: Callable) -> None:
    with mesh_of():
        comparison.assert_logits_and_gradients(case, live(case), kind)


@pytest.mark.parametrize("case", TRAINED, ids=lambda case: case.name)
def test_twenty_steps_of_adamw(case: Case, mesh_of: Callable) -> None:
    with mesh_of():
        comparison.assert_training(case, live(case))


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: case.name)
def test_the_recording_is_what_its_script_makes(case: Case) -> None:
    recorded, made = comparison.recorded(case), live(case)
    assert recorded.keys() == made.keys()
    for name, array in made.items():
        np.testing.assert_allclose(recorded[name], array, rtol=1e-4, atol=1e-5, err_msg=name)
