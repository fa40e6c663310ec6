"""Attention in segments and tiles is the definition's, whatever the shapes; `test_kernels.py` has small contexts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.cache import bytes_of, encode
from kernels.ops import AttentionBatch
from kernels.triton import attention, cache
from tests.triton_machine_code import run_machine_code
from tests.triton_memory import far_rows

pytestmark = pytest.mark.usefixtures("interpreted")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8}  # bf16: probabilities and results are rounded, 2^-9 each
KEPT = [torch.float8_e4m3fn, torch.int8]


@dataclass(frozen=True)
class Case:
    sequences: Sequence[tuple[int, int]]  # (query tokens, context length with them)
    num_heads: int = 8
    num_groups: int = 2
    head_size: int = 64
    block_size: int = 16
    latent_size: int = 0  # of a value that is the first part of its key; 0: values have a cache of their own
    window: int | None = None
    has_sinks: bool = False


CASES = {
    "a context in segments": Case([(1, 1300)]),
    "contexts of a segment, and one position more": Case([(1, 256), (1, 257), (1, 512)]),
    "blocks of a tile": Case([(1, 700), (3, 64), (2, 65)], block_size=64),
    "blocks of more than a tile": Case([(1, 700)], block_size=128),
    "blocks that no tile divides": Case([(1, 333), (40, 47)], block_size=24),
    "heads of two powers of two": Case([(1, 300), (50, 70)], head_size=80),
    "heads of less than a matrix instruction": Case([(1, 300), (50, 70)], head_size=8),
    "drafts over segments": Case([(4, 900), (7, 600)]),
    "windows within and across segments": Case([(1, 1300), (4, 900), (70, 200)], window=300),
    "a window from within a block of a tile": Case([(1, 700)], block_size=64, window=300),
    "a window of one": Case([(1, 300), (40, 90)], window=1),
    "sinks in segments": Case([(1, 700), (70, 100)], has_sinks=True),
    "windows and sinks": Case([(1, 1300), (40, 600)], window=600, has_sinks=True),
    "a prompt of several tiles": Case([(90, 90)]),
    "the next chunk of a prompt, in segments": Case([(20, 1000)], num_heads=2),
    "a group of heads that is no power of two": Case([(1, 300), (30, 50)], num_heads=10),
    "a group of as many heads as a tile has rows": Case([(1, 20), (2, 9)], num_heads=128, num_groups=1),
    "a group of more heads than any tile has rows": Case([(1, 20)], num_heads=130, num_groups=1),
    "a latent cache": Case([(1, 600), (3, 40), (30, 50)], 16, 1, head_size=80, latent_size=64),
    "DeepSeek's latent cache": Case([(1, 70), (3, 40)], 16, 1, head_size=576, latent_size=512),
}


class Inputs:
    """A case with random numbers: unused slots are NaN, and block 0 belongs to nobody."""

    def __init__(self, case: Case, dtype: torch.dtype, kept: torch.dtype | None = None) -> None:
        self.case = case
        kept = kept or dtype
        num_blocks = [math.ceil(length / case.block_size) for _, length in case.sequences]
        tables = torch.split(torch.randperm(sum(num_blocks)) + 1, num_blocks)
        shape = (sum(num_blocks) + 1, case.block_size, case.num_groups, case.head_size)
        self.keys, self.values = (encode(torch.full(shape, math.nan), kept) for _ in range(2))
        for table, (_, length) in zip(tables, case.sequences, strict=True):
            position = torch.arange(length)
            for kept_rows in (self.keys, self.values):
                place = table[position // case.block_size], position % case.block_size
                # Of sizes that differ from row to row: int8's have scales of their own.
                rows = torch.randn(length, *shape[2:]) * torch.randn(length, shape[2], 1).exp()
                bytes_of(kept_rows)[place] = bytes_of(encode(rows if kept in KEPT else torch.randn(rows.shape), kept))
        if case.latent_size:
            self.values = self.keys[..., : case.latent_size]
        self.batch = AttentionBatch(
            torch.nn.utils.rnn.pad_sequence(list(tables), batch_first=True),
            [0, *accumulate(queries for queries, _ in case.sequences)],
            [length for _, length in case.sequences],
            torch.empty(0, dtype=torch.int64),
        )
        self.query = torch.randn(self.batch.query_starts[-1], case.num_heads, case.head_size).to(dtype)
        self.sinks = torch.randn(case.num_heads).to(dtype) if case.has_sinks else None
        self.scale = case.head_size**-0.5

    def attend(self, function) -> Tensor:
        return function(
            self.query, self.keys, self.values, self.batch, self.scale, window=self.case.window, sinks=self.sinks
        )

    def alone(self, sequence: int) -> "Inputs":
        """The same memory, with one sequence in the batch."""
        start, end = self.batch.query_starts[sequence : sequence + 2]
        inputs = Inputs.__new__(Inputs)
        inputs.__dict__ = self.__dict__ | {
            "query": self.query[start:end],
            "batch": replace(
                self.batch,
                block_tables=self.batch.block_tables[sequence, None],
                query_starts=[0, end - start],
                context_lens=[self.batch.context_lens[sequence]],
                plans={},
            ),
        }
        return inputs


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    difference = (actual.float() - expected.float()).norm() / expected.float().norm()
    assert difference <= TOLERANCE[actual.dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_attention_is_the_definitions(case: Case, dtype: torch.dtype) -> None:
    inputs = Inputs(case, dtype)
    assert_close(inputs.attend(attention.attention), inputs.attend(reference.attention))


CASES_OF_8_BITS = [
    "contexts of a segment, and one position more",
    "blocks that no tile divides",
    "heads of two powers of two",
    "drafts over segments",
    "windows and sinks",
    "a prompt of several tiles",
]


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("name", CASES_OF_8_BITS)
def test_attention_over_8_bits_is_the_definitions(name: str, kept: torch.dtype) -> None:
    inputs = Inputs(CASES[name], torch.bfloat16, kept)
    assert_close(inputs.attend(attention.attention), inputs.attend(reference.attention))


def test_attention_over_latents_in_fp8_is_the_definitions() -> None:
    inputs = Inputs(CASES["a latent cache"], torch.bfloat16, torch.float8_e4m3fn)
    assert_close(inputs.attend(attention.attention), inputs.attend(reference.attention))


@pytest.mark.parametrize("kept", KEPT)
def test_heads_of_no_whole_words_are_the_definitions(kept: torch.dtype) -> None:
    inputs = Inputs(Case([(1, 20)], head_size=18), torch.bfloat16, kept)
    assert_close(inputs.attend(attention.attention), inputs.attend(reference.attention))


@pytest.mark.parametrize(
    ("code", "kept"), [(cache._FP8_ASM.value, torch.float8_e4m3fn), (cache._INT8_ASM.value, torch.int8)]
)
def test_the_machine_code_makes_the_numbers_that_the_bytes_stand_for(code: str, kept: torch.dtype) -> None:
    """All bytes in all four places, by a small model of the instructions."""
    byte = torch.arange(256)
    places = [(byte * (2 * i + 3) + 41 * i) % 256 for i in range(4)]
    word = torch.stack([place << (8 * i) for i, place in enumerate(places)]).sum(0)
    made = run_machine_code(code, {"$4": word})
    for i, number in enumerate(places):
        expected = number.to(torch.uint8).view(kept).half()
        actual = made[f"${i}"].to(torch.uint16).view(torch.float16)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_a_sequence_gets_the_same_bits_alone_and_in_company() -> None:
    inputs = Inputs(Case([(1, 700), (4, 300), (40, 90), (1, 5)], has_sinks=True), torch.bfloat16)
    together = inputs.attend(attention.attention)
    alone = torch.cat([inputs.alone(sequence).attend(attention.attention) for sequence in range(4)])
    assert torch.equal(together, alone)


def test_layers_of_two_kinds_share_a_batch() -> None:
    """Each has its own plan: a window cuts the contexts otherwise."""
    inputs = Inputs(Case([(1, 700)], window=40), torch.float32)
    inputs.attend(attention.attention)
    inputs.case = replace(inputs.case, window=None)
    assert_close(inputs.attend(attention.attention), inputs.attend(reference.attention))


def test_a_cache_beyond_32_bits() -> None:
    rows = far_rows(3, 64)
    whole = rows.as_strided((2**31 // 64 + 1, 1, 1, 64), (64, 64, 64, 1))
    batch = AttentionBatch(torch.tensor([[2**31 // 64, 0]]), [0, 1], [2], torch.empty(0, dtype=torch.int64))
    query = torch.randn(1, 2, 64).bfloat16()
    actual = attention.attention(query, whole, whole, batch, 0.1)
    near = rows[[2, 0], None, None]
    nearby = replace(batch, block_tables=torch.tensor([[0, 1]]), plans={})
    assert_close(actual, reference.attention(query, near, near, nearby, 0.1))
