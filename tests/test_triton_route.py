"""The choice of experts is the definition's, in order and on ties; `test_kernels.py` has the meaning of the scores."""

import pytest
import torch

from kernels import reference
from kernels.triton import OPS

pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "unit"])
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize(("num_experts", "num_chosen"), [(8, 2), (7, 3), (60, 4), (128, 8), (5, 5)])
def test_route_is_the_definitions(num_experts: int, num_chosen: int, renormalise: bool, score: str) -> None:
    logits = torch.randn(4, 2 * num_experts)[:, :num_experts].bfloat16()  # of which many are equal
    actual = OPS.route(logits, num_chosen, score, renormalise, 2.5)
    expected = reference.route(logits, num_chosen, score, renormalise, 2.5)
    assert torch.equal(actual[1], expected[1])
    torch.testing.assert_close(actual[0], expected[0])


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize(
    ("num_experts", "num_chosen", "num_groups", "groups_chosen"), [(16, 3, 4, 2), (60, 6, 5, 3), (160, 6, 8, 3)]
)
def test_experts_in_groups_are_the_definitions(
    num_experts: int, num_chosen: int, num_groups: int, groups_chosen: int, renormalise: bool, score: str
) -> None:
    logits = torch.randn(4, num_experts).bfloat16()  # of which many are equal
    actual, expected = (
        table.route(logits, num_chosen, score, renormalise, 16.0, num_groups, groups_chosen)
        for table in (OPS, reference.OPS)
    )
    assert torch.equal(actual[1], expected[1])
    torch.testing.assert_close(actual[0], expected[0])


@pytest.mark.parametrize(
    ("num_experts", "num_chosen", "num_groups", "groups_chosen"),
    [(12, 3, 1, 1), (60, 6, 5, 3), (256, 8, 8, 4), (6, 2, 6, 2)],
)
def test_a_choice_with_a_bias_is_the_definitions(
    num_experts: int, num_chosen: int, num_groups: int, groups_chosen: int
) -> None:
    logits, bias = torch.randn(4, num_experts).bfloat16(), torch.randn(num_experts)
    bias[::3] = 0.5  # so that some are equal
    actual, expected = (
        table.route(logits, num_chosen, "sigmoid", True, 2.5, num_groups, groups_chosen, bias)
        for table in (OPS, reference.OPS)
    )
    assert torch.equal(actual[1], expected[1])
    torch.testing.assert_close(actual[0], expected[0])


def test_logits_that_are_not_numbers_choose_experts_that_there_are() -> None:
    logits = torch.full((2, 5), torch.nan)
    logits[1, 3] = 1.0
    for num_groups in (1, 5):
        _, experts = OPS.route(logits, 2, "softmax", True, 1.0, num_groups, min(num_groups, 2))
        assert ((experts >= 0) & (experts < 5)).all()
