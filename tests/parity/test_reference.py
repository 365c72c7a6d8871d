"""From the same weights jaxgpt gives what transformers and PyTorch gave when `make_reference.py` recorded them."""

from collections.abc import Callable

import comparison
import pytest
from comparison import RECORDED, Case

pytestmark = pytest.mark.parametrize("case", RECORDED, ids=lambda case: case.name)


@pytest.mark.parametrize("kind", ["whole", "packed"])
def test_logits_and_gradients(case: Case, kind: str, mesh_of: Callable) -> None:
    with mesh_of():
        comparison.assert_logits_and_gradients(case, comparison.recorded(case), kind)


def test_logits_of_nothing_but_tokens(case: Case, mesh_of: Callable) -> None:
    with mesh_of():
        comparison.assert_plain_logits(case, comparison.recorded(case))


def test_twenty_steps_of_adamw(case: Case, mesh_of: Callable) -> None:
    with mesh_of():
        comparison.assert_training(case, comparison.recorded(case))


def test_padding_rows_mean_nothing(case: Case, mesh_of: Callable) -> None:
    with mesh_of():
        comparison.assert_padding_rows_mean_nothing(case, comparison.recorded(case))
