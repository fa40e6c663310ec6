"""Log probabilities are the definition's on rows that are awkward; plain ones and ties: `test_kernels.py`."""

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.triton import OPS
from kernels.triton.logprobs import BLOCK
from tests.triton_memory import far_rows

pytestmark = pytest.mark.usefixtures("interpreted")


def assert_the_definitions(logits: Tensor, num_top: int) -> None:
    chosen = torch.arange(len(logits)) * 7 % logits.shape[1]
    actual, expected = (table.logprobs(logits, chosen, num_top) for table in (OPS, reference.OPS))
    assert torch.equal(actual[1], expected[1])
    for ours, definitions in ((actual[0], expected[0]), (actual[2], expected[2])):
        # fp32 on both sides: sums in another order, and exponentials of another library.
        torch.testing.assert_close(ours, definitions, rtol=1e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("vocab_size", [1, 37, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
def test_any_vocabulary_in_rows_of_wider_ones(vocab_size: int) -> None:
    logits = (torch.randn(3, vocab_size + 16) * 5)[:, :vocab_size]
    assert_the_definitions(logits, 20)  # of the smallest: as many as there are


def test_the_likeliest_may_all_be_of_one_block_or_each_of_another() -> None:
    logits = torch.randn(3, 5 * BLOCK)
    logits[0, 2 * BLOCK : 2 * BLOCK + 30] += 20
    logits[1, ::BLOCK] = 20.0
    logits[2, BLOCK - 1 : BLOCK + 1] = 20.0  # equal, on either side of a boundary
    assert_the_definitions(logits, 12)


@pytest.mark.filterwarnings("ignore:invalid value")  # infinity less infinity
def test_tokens_that_cannot_be_come_last() -> None:
    logits = torch.full((4, 2 * BLOCK + 9), -torch.inf)
    logits[0, 5] = 1.0
    logits[1, [3, BLOCK, BLOCK + 2]] = torch.tensor([2.0, 3.0, 2.0])
    logits[2, :BLOCK] = torch.randn(BLOCK)  # and nothing in all other blocks
    assert_the_definitions(logits, 7)  # the last row has nothing at all: no number, and the first ids


@pytest.mark.filterwarnings("ignore:invalid value")  # infinity less infinity
def test_rows_that_are_not_numbers_bring_none_and_ids_that_there_are() -> None:
    logits = torch.randn(3, BLOCK + 100)
    logits[0, 70] = torch.nan
    logits[1, [BLOCK + 3, 4]] = torch.tensor([torch.nan, -torch.nan])  # of either sign
    logits[2, 99] = torch.inf
    assert_the_definitions(logits, 4)


def test_zeros_of_either_sign_are_equal() -> None:
    logits = torch.zeros(2, 200)
    logits[:, ::2] = -0.0
    assert_the_definitions(logits, 9)


def test_rows_beyond_32_bits() -> None:
    assert_the_definitions(far_rows(3, 48, torch.float32), 3)
