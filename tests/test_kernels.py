"""Every backend does what the definition does, and the definition does what the papers say."""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from engine.quant import FORMATS
from kernels import reference
from kernels.backends import BACKENDS, pick
from kernels.cpu.native.build import INSTRUCTION_SETS
from kernels.cpu.native.build import load as load_kernels
from kernels.ops import AttentionBatch, HeadNorms, Ops, SamplingRow, WeightKernel
from kernels.weights import int4_by
from tests import triton_interpreter

DTYPES = [torch.float32, torch.bfloat16]

# Of the norm of the result. fp32: sums of up to 4,096 terms in another order, each 6e-8. bf16: operands and result are
# rounded, 2^-9 each, and a gated product once more in between.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


MULTIPLIED = ["fp32", "bf16", "int8", "int4"]  # by every backend, and named after their layout

# The C++ table once for each of its instruction sets.
NATIVE = [f"cpu-{name}" for name in INSTRUCTION_SETS]
TABLES = [name for name in BACKENDS if name != "cpu"] + NATIVE

# Which table multiplies by which format. Those of Triton's that are its own: `test_triton_products.py`.
PRODUCTS = [
    *((table, name) for table in TABLES for name in MULTIPLIED),
    *((table, name) for table in NATIVE for name in ("mxfp4", "fp8", "fp8-blocks")),
]
PRODUCTS_TO_COMPARE = [(table, name) for table, name in PRODUCTS if table != "reference"]


@pytest.fixture(params=[name for name in TABLES if name != "reference"])
def ops(request: pytest.FixtureRequest) -> Iterator[Ops]:
    with table(request.param) as ops:
        yield ops


@pytest.fixture(params=TABLES)
def any_ops(request: pytest.FixtureRequest) -> Iterator[Ops]:
    with table(request.param) as ops:
        yield ops


@contextmanager
def table(name: str) -> Iterator[Ops]:
    if name == "triton":
        triton_interpreter.install()
    if name in BACKENDS:
        yield pick("cpu", name)
        return
    instruction_set = name.removeprefix("cpu-")
    there = load_kernels()
    if instruction_set not in there:
        pytest.skip(f"this processor has no {instruction_set}")
    torch.ops.tokenmill_cpu.use_instruction_set(instruction_set)
    yield pick("cpu", "cpu")
    torch.ops.tokenmill_cpu.use_instruction_set(there[0])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    difference = (actual.float() - expected.float()).norm()
    assert difference <= tolerance * expected.float().norm(), f"off by {difference / expected.float().norm():.2e}"


# ------------------------------------------------------------------------------------------------------------- backends


def test_a_device_runs_its_own_table_unless_another_is_named() -> None:
    assert pick("cpu") is pick("cpu", "cpu")
    assert pick("cuda").name == "triton"
    assert pick("cpu", "cpu-torch").name == "cpu-torch"
    assert pick("cpu", "reference") is reference.OPS


def test_an_unknown_backend_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match="reference, cpu"):
        pick("cpu", "abacus")


def test_every_backend_multiplies_by_the_usual_formats_and_the_definition_by_all(any_ops: Ops) -> None:
    """What a backend lacks is unpacked at load: `test_loader.py`."""
    assert set(any_ops.weights) >= set(MULTIPLIED)
    assert set(reference.OPS.weights) == {kept.layout for kept in FORMATS.values()}


# ---------------------------------------------------------------------------------------------------- norms, activation


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_norms_agree_with_the_definition(ops: Ops, dtype: torch.dtype, num_tokens: int) -> None:
    x, residual = torch.randn(2, num_tokens, 48).to(dtype)
    weight = torch.randn(48).to(dtype)
    assert_close(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), TOLERANCE[dtype])
    for actual, expected in zip(
        ops.add_rms_norm(x, residual, weight, 1e-5), reference.add_rms_norm(x, residual, weight, 1e-5), strict=True
    ):
        assert_close(actual, expected, TOLERANCE[dtype])


def test_a_row_of_zeros_has_a_norm_of_zeros(any_ops: Ops) -> None:
    assert torch.equal(any_ops.rms_norm(torch.zeros(1, 8), torch.ones(8), 1e-6), torch.zeros(1, 8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_swiglu_agrees_with_the_definition(ops: Ops, dtype: torch.dtype, num_tokens: int) -> None:
    gate_up = torch.randn(num_tokens, 2 * 24).to(dtype)
    before = gate_up.clone()
    assert_close(ops.swiglu(gate_up), reference.swiglu(gate_up), TOLERANCE[dtype])
    assert torch.equal(gate_up, before), "the input is not written to"


def test_rotary_multiplies_complex_numbers(any_ops: Ops) -> None:
    x, angle = torch.randn(5, 3, 16), torch.randn(5, 8)
    rotated = torch.complex(x[..., :8], x[..., 8:]) * torch.polar(torch.ones(5, 8), angle)[:, None]
    expected = torch.cat([rotated.real, rotated.imag], dim=-1)
    assert_close(any_ops.rotary(x, angle.cos(), angle.sin()), expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("has_norms", [False, True])
def test_heads_are_normed_rotated_and_written(any_ops: Ops, has_norms: bool) -> None:
    heads, angle, slots = (
        torch.randn(3, 9, 16),
        torch.randn(3, 8),
        torch.tensor([5, 0, 7]),
    )  # 5 queries, 2 keys, 2 values
    norms = HeadNorms(torch.randn(16), torch.randn(16), 1e-5) if has_norms else None
    keys, values = torch.zeros(2, 2, 4, 2, 16)
    queries = any_ops.rotate_and_write(heads, norms, angle.cos(), angle.sin(), keys, values, slots)
    expected = heads[:, :7]
    if norms:
        weight = torch.cat([norms.query.expand(5, -1), norms.key.expand(2, -1)])
        expected = functional.rms_norm(expected, (16,), None, 1e-5) * weight
    expected = reference.rotary(expected, angle.cos(), angle.sin())
    assert_close(queries, expected[:, :5], TOLERANCE[torch.float32])
    assert_close(keys.view(8, 2, 16)[slots], expected[:, 5:], TOLERANCE[torch.float32])
    assert torch.equal(values.view(8, 2, 16)[slots], heads[:, 7:])


# ------------------------------------------------------------------------------------------------------------ attention

# Sequences as (query tokens, context length with them); blocks hold 4 tokens, so most contexts end inside a block.
BATCHES = {
    "one decode": [(1, 9)],
    "the first token": [(1, 1)],
    "one whole prompt": [(13, 13)],
    "the rest of a prompt": [(5, 22)],
    "decodes of ragged contexts": [(1, 1), (1, 4), (1, 5), (1, 31), (1, 16)],
    "decodes of very ragged contexts": [(1, 3), (1, 700), (1, 300), (1, 260), (1, 2)],
    "drafts": [(4, 11), (4, 40), (1, 8), (3, 3)],
    "prefill, decode and drafts": [(18, 25), (1, 9), (3, 17), (1, 30), (9, 9), (18, 18)],
    "a sequence without tokens": [(2, 6), (0, 5), (1, 7)],
}
HEADS = [(9, 3), (4, 4), (4, 1)]  # (query heads, key-value heads)


class Cache:
    """Keys and values of some sequences in blocks of 4, in random places; every slot not written is NaN."""

    block_size = 4

    def __init__(
        self, sequences: Sequence[tuple[int, int]], num_groups: int, head_size: int, dtype: torch.dtype
    ) -> None:
        num_blocks = [math.ceil(length / self.block_size) for _, length in sequences]
        places = torch.split(
            torch.randperm(sum(num_blocks)) + 1, num_blocks
        )  # block 0 pads the tables and is never used
        shape = (sum(num_blocks) + 1, self.block_size, num_groups, head_size)
        self.key_cache, self.value_cache = (torch.full(shape, math.nan, dtype=dtype) for _ in range(2))
        self.keys = [torch.randn(length, num_groups, head_size).to(dtype) for _, length in sequences]
        self.values = [torch.randn(length, num_groups, head_size).to(dtype) for _, length in sequences]
        slots = [
            torch.tensor(
                [int(table[p // self.block_size]) * self.block_size + p % self.block_size for p in range(length)]
            )
            for table, (_, length) in zip(places, sequences, strict=True)
        ]
        reference.write_kv(
            torch.cat(self.keys), torch.cat(self.values), self.key_cache, self.value_cache, torch.cat(slots)
        )
        self.batch = AttentionBatch(
            block_tables=torch.nn.utils.rnn.pad_sequence(list(places), batch_first=True),
            query_starts=[0, *itertools.accumulate(queries for queries, _ in sequences)],
            context_lens=[length for _, length in sequences],
            slots=torch.cat([s[length - queries :] for s, (queries, length) in zip(slots, sequences, strict=True)]),
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("sequences", BATCHES.values(), ids=BATCHES.keys())
def test_attention_agrees_with_the_definition_and_reads_no_unused_slot(
    ops: Ops, sequences: list[tuple[int, int]], heads: tuple[int, int], dtype: torch.dtype
) -> None:
    num_heads, num_groups = heads
    cache = Cache(sequences, num_groups, 16, dtype)
    query = torch.randn(cache.batch.query_starts[-1], num_heads + 2, 16).to(dtype)[:, :num_heads]  # not contiguous
    expected = reference.attention(query, cache.key_cache, cache.value_cache, cache.batch, 0.3)
    assert expected.isfinite().all()
    for _ in ("first layer", "a later layer, by the plan of the first"):
        actual = ops.attention(query, cache.key_cache, cache.value_cache, cache.batch, 0.3)
        assert_close(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("sequences", BATCHES.values(), ids=BATCHES.keys())
def test_the_definition_of_attention_is_causal_softmax_attention(sequences: list[tuple[int, int]]) -> None:
    cache = Cache(sequences, 3, 16, torch.float32)
    whole = [torch.randn(length, 9, 16) for _, length in sequences]
    query = torch.cat([q[length - queries :] for q, (queries, length) in zip(whole, sequences, strict=True)])
    expected = [
        dense_attention(q, key, value)[len(q) - queries :]
        for q, key, value, (queries, _) in zip(whole, cache.keys, cache.values, sequences, strict=True)
    ]
    actual = reference.attention(query, cache.key_cache, cache.value_cache, cache.batch, 0.3)
    assert_close(actual, torch.cat(expected), TOLERANCE[torch.float32])


def dense_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """A whole sequence at once by torch: query (length, H, D), key and value (length, G, D)."""
    query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    return functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.3, enable_gqa=True
    ).transpose(0, 1)


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("sequences", BATCHES.values(), ids=BATCHES.keys())
def test_windows_and_sinks_are_a_mask_and_one_more_score(
    any_ops: Ops, sequences: list[tuple[int, int]], has_sinks: bool, window: int | None
) -> None:
    cache = Cache(sequences, 3, 16, torch.float32)
    sinks = torch.randn(9) if has_sinks else None
    query = torch.randn(cache.batch.query_starts[-1], 9, 16)
    actual = any_ops.attention(query, cache.key_cache, cache.value_cache, cache.batch, 0.3, window, sinks)
    row = 0
    for keys, values, (num_queries, length) in zip(cache.keys, cache.values, sequences, strict=True):
        for position in range(length - num_queries, length):
            seen = slice(max(0, position + 1 - (window or length)), position + 1)
            for head in range(9):
                scores = keys[seen, head // 3] @ query[row, head] * 0.3
                mass = scores.exp()
                total = mass.sum() + (0 if sinks is None else sinks[head].exp())
                assert_close(actual[row, head], mass @ values[seen, head // 3] / total, TOLERANCE[torch.float32])
            row += 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sequences", BATCHES.values(), ids=BATCHES.keys())
def test_values_may_be_a_part_of_the_keys(any_ops: Ops, sequences: list[tuple[int, int]], dtype: torch.dtype) -> None:
    """As latent attention keeps them: one cache, of which the values are the first places."""
    cache = Cache(sequences, 1, 24, dtype)
    query = torch.randn(cache.batch.query_starts[-1], 6, 24).to(dtype)
    values = cache.key_cache[..., :16]
    apart = reference.attention(query, cache.key_cache, values.contiguous(), cache.batch, 0.3)
    assert_close(any_ops.attention(query, cache.key_cache, values, cache.batch, 0.3), apart, TOLERANCE[dtype])
    assert apart.shape[2] == 16


def test_keys_and_values_may_be_written_into_two_parts_of_one_cache(any_ops: Ops) -> None:
    cache, key, value = torch.zeros(5, 4, 1, 24), torch.randn(3, 1, 16), torch.randn(3, 1, 8)
    any_ops.write_kv(key, value, cache[..., :16], cache[..., 16:], torch.tensor([17, 2, 3]))
    assert torch.equal(cache.view(20, 24)[[17, 2, 3]], torch.cat([key, value], dim=-1)[:, 0])
    assert cache.count_nonzero() == 3 * 24


def test_attention_over_no_sequences_is_empty(any_ops: Ops) -> None:
    batch = AttentionBatch(torch.empty(0, 0, dtype=torch.int64), [0], [], torch.empty(0, dtype=torch.int64))
    cache = torch.zeros(2, 4, 3, 16)
    assert any_ops.attention(torch.empty(0, 9, 16), cache, cache, batch, 0.3).shape == (0, 9, 16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_write_kv_fills_the_named_slots_and_no_other(any_ops: Ops, dtype: torch.dtype) -> None:
    key, value = torch.randn(2, 3, 2, 8)
    key_cache, value_cache = torch.zeros(2, 5, 4, 2, 8, dtype=dtype)
    any_ops.write_kv(key, value, key_cache, value_cache, torch.tensor([17, 2, 3]))
    assert torch.equal(key_cache[[4, 0, 0], [1, 2, 3]], key.to(dtype))
    assert torch.equal(value_cache[[4, 0, 0], [1, 2, 3]], value.to(dtype))
    assert key_cache.count_nonzero() == key.numel()


# --------------------------------------------------------------------------------------------------------------- linear

# (in, out): whole vectors; an `in` that no vector width divides, where torch's int8 kernel would run over the row's
# end; an `out` that its int4 kernel refuses; more than one piece of a widened weight.
SHAPES = [(32, 16), (70, 24), (96, 33), (576, 600)]
NUM_ROWS = [0, 1, 4, 5, 33, 129]  # either side of each limit between two paths


@pytest.mark.filterwarnings("ignore:this processor has no bf16")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("ops", "name", "shape"),
    [
        (table, name, shape)
        for table, name in PRODUCTS_TO_COMPARE
        for shape in SHAPES
        if name not in ("int4", "mxfp4") or shape[0] % 32 == 0  # they take whole groups alone
    ],
    indirect=["ops"],
    ids=str,
)
def test_linear_agrees_with_the_definition(ops: Ops, name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    parts = FORMATS[name].quantize(torch.randn(shape[1], shape[0]) * 0.02)
    kernel, definition = kernel_of(ops, name), kernel_of(reference.OPS, name)
    weight, expected_weight = kernel.prepare(parts), definition.prepare(parts)
    tolerance = TOLERANCE[dtype if name == "fp32" or ops.name == "cpu" else torch.bfloat16]  # as C++ prepares rows
    for num_rows in NUM_ROWS:
        x = torch.randn(num_rows, shape[0]).to(dtype)
        multiplied = reference.quantize_rows(x) if quantizes_rows(ops, name) else x
        assert_close(kernel.linear(x, weight), definition.linear(multiplied, expected_weight).to(dtype), tolerance)


@pytest.mark.parametrize("num_rows", [1, 200])
def test_larger_groups_of_int4_are_multiplied_as_the_groups_of_32_in_them(any_ops: Ops, num_rows: int) -> None:
    """And scales of more bits than bf16 has as bf16, but by the definition."""
    parts = dict(FORMATS["int4-g128"].quantize(torch.randn(48, 256)))
    kernel, x = any_ops.weights["int4"], torch.randn(num_rows, 256)
    assert_close(
        kernel.linear(x, kernel.prepare(parts)),
        kernel.linear(x, kernel.prepare(int4_by(parts, 32))),
        TOLERANCE[torch.float32],  # sums in another order
    )
    expected = kernel.linear(x, kernel.prepare(parts))
    finer = parts | {name: parts[name].float() * (1 + 2**-10) for name in ("scale", "zero")}
    assert torch.equal(kernel.linear(x, kernel.prepare(finer)), expected) == (any_ops.name != "reference")


def kernel_of(ops: Ops, name: str) -> WeightKernel:
    """How the table multiplies by a format."""
    return ops.weights[FORMATS[name].layout]


def quantizes_rows(ops: Ops, name: str) -> bool:
    """Whether the table's products with this format are of integers on both sides."""
    return ops.name == "cpu" and name in ("int8", "int4", "mxfp4")


@pytest.mark.parametrize("size", [3, 64, 150])
def test_quantized_rows_are_off_by_half_a_level_of_their_group_at_most(size: int) -> None:
    x = torch.cat([torch.randn(5, size), torch.zeros(1, size)])
    x[:, ::64] *= 10 ** torch.arange((size + 63) // 64)  # groups of different magnitudes
    difference = reference.quantize_rows(x) - x
    for group, off in zip(x.split(64, dim=1), difference.split(64, dim=1), strict=True):
        half_a_level = group.abs().amax(1, keepdim=True) / 127 / 2
        assert (off.abs() <= half_a_level * (1 + 1e-5)).all()


@pytest.mark.parametrize("what", [torch.nan, torch.inf, -torch.inf])
def test_a_quantized_group_with_anything_not_finite_is_all_nan(what: float) -> None:
    x = torch.randn(2, 150)
    x[1, 70] = what
    quantized = reference.quantize_rows(x)
    assert quantized[1, 64:128].isnan().all()
    assert quantized.isnan().sum() == 64


@pytest.mark.filterwarnings("ignore:this processor has no bf16")
@pytest.mark.parametrize(("any_ops", "name"), PRODUCTS, indirect=["any_ops"])
def test_what_is_not_finite_shows_in_its_own_row_alone(any_ops: Ops, name: str) -> None:
    kernel = kernel_of(any_ops, name)
    weight = kernel.prepare(FORMATS[name].quantize(torch.randn(64, 96)))
    x = torch.randn(3, 96)
    x[0, 5], x[2, 90] = torch.nan, torch.inf
    assert kernel.linear(x, weight).isfinite().all(dim=1).tolist() == [False, True, False]


@pytest.mark.filterwarnings("ignore:this processor has no bf16")
@pytest.mark.parametrize("num_rows", [2, 5, 40, 200])
@pytest.mark.parametrize(("any_ops", "name"), PRODUCTS, indirect=["any_ops"])
def test_a_row_is_multiplied_alike_whatever_its_neighbours_hold(any_ops: Ops, name: str, num_rows: int) -> None:
    kernel = kernel_of(any_ops, name)
    weight = kernel.prepare(FORMATS[name].quantize(torch.randn(64, 96)))
    x = torch.randn(num_rows, 96).bfloat16()
    beside_an_outlier = x.clone()
    beside_an_outlier[-1] = 1e4
    assert torch.equal(kernel.linear(x, weight)[:-1], kernel.linear(beside_an_outlier, weight)[:-1])


@pytest.mark.parametrize("num_rows", [1, 20])
@pytest.mark.parametrize("ops", NATIVE, indirect=True)
def test_a_weight_of_fp8_that_is_no_number_shows_in_its_feature_alone(ops: Ops, num_rows: int) -> None:
    parts = FORMATS["fp8"].quantize(torch.randn(70, 200))
    for row, column, code in [(3, 5, 0x7F), (69, 199, 0xFF)]:
        parts["q"].view(torch.uint8)[row, column] = code
    product = ops.weights["fp8"].linear(torch.randn(num_rows, 200), ops.weights["fp8"].prepare(parts))
    assert product.isnan().any(0).nonzero()[:, 0].tolist() == [3, 69]


@pytest.mark.parametrize(("ops", "name"), [(t, name) for t, name in PRODUCTS if t in NATIVE], indirect=["ops"])
def test_in_cpp_a_row_is_multiplied_alike_however_many_there_are(ops: Ops, name: str) -> None:
    kernel = kernel_of(ops, name)
    weight = kernel.prepare(FORMATS[name].quantize(torch.randn(100, 288)))
    x = torch.randn(40, 288)
    together = kernel.linear(x, weight)
    for num_rows in (1, 3, 6, 7, 13):
        assert torch.equal(kernel.linear(x[:num_rows], weight), together[:num_rows])


# -------------------------------------------------------------------------------------------------------------- experts


@pytest.mark.filterwarnings("ignore:this processor has no bf16")
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 19])
@pytest.mark.parametrize(("ops", "name"), PRODUCTS_TO_COMPARE, indirect=["ops"])
@pytest.mark.parametrize(("num_experts", "num_chosen"), [(8, 7), (5, 1), (16, 2)])
def test_experts_agree_with_the_definition(
    ops: Ops, name: str, num_experts: int, num_chosen: int, num_tokens: int
) -> None:
    dtype = torch.float32 if name == "fp32" else torch.bfloat16
    gate_up = [FORMATS[name].quantize(torch.randn(2 * 32, 64) * 0.1) for _ in range(num_experts)]
    down = [FORMATS[name].quantize(torch.randn(64, 32) * 0.1) for _ in range(num_experts)]
    x = torch.randn(num_tokens, 64).to(dtype)
    routed = reference.route(torch.randn(num_tokens, num_experts), num_chosen, "softmax", True)

    def quantized_linear(x: Tensor, weight: Tensor) -> Tensor:
        return reference.linear(reference.quantize_rows(x), weight)

    actual, expected = (
        table.experts(
            x if table is ops else x.float(),
            *routed,
            kernel_of(table, name).stack([kernel_of(table, name).prepare(parts) for parts in gate_up]),
            kernel_of(table, name).stack([kernel_of(table, name).prepare(parts) for parts in down]),
            kernel_of(table, name).linear if table is ops or not quantizes_rows(ops, name) else quantized_linear,
            table.swiglu,
        )
        for table in (ops, reference.OPS)
    )
    assert_close(actual, expected.to(dtype), 2 * TOLERANCE[dtype])  # two products and a gate in a row


def test_experts_may_have_groups_of_two_sizes(ops: Ops) -> None:
    """Of int4, where one of their sizes falls into groups of 64 and the other does not."""
    gate_up = [FORMATS["int4-g64"].quantize(torch.randn(2 * 96, 64) * 0.1) for _ in range(3)]
    down = [FORMATS["int4-g64"].quantize(torch.randn(64, 96) * 0.1) for _ in range(3)]
    routed, x = reference.route(torch.randn(5, 3), 2, "softmax", True), torch.randn(5, 64).bfloat16()

    def computed(table: Ops) -> Tensor:
        kernel = table.weights["int4"]
        stacks = [kernel.stack([kernel.prepare(parts) for parts in of]) for of in (gate_up, down)]
        return table.experts(x, *routed, stacks[0], stacks[1], kernel.linear, table.swiglu)

    actual, expected = computed(ops), computed(reference.OPS)
    assert_close(actual, expected, 0.03)  # a backend may round rows to int8 before both products: 1 % each


@pytest.mark.parametrize("num_tokens", [1, 2, 40, 700])
@pytest.mark.parametrize("num_held", [1, 3])
@pytest.mark.parametrize("name", ["bf16", "int8"])
def test_a_choice_that_is_another_ranks_adds_nothing(ops: Ops, name: str, num_held: int, num_tokens: int) -> None:
    """Of 16 experts some are here; the others' pairs are many, or all there are."""
    kernel = ops.weights[name]
    matrices = [[FORMATS[name].quantize(torch.randn(shape) * 0.1) for _ in range(16)] for shape in [(64, 64), (64, 32)]]
    gate_up, down = ([kernel.prepare(parts) for parts in of] for of in matrices)
    weights, chosen = reference.route(torch.randn(num_tokens, 16), 2, "softmax", True)
    x, is_held = torch.randn(num_tokens, 64).bfloat16(), chosen < num_held
    held = weights.where(is_held, 0), chosen.where(is_held, num_held)
    stacks = kernel.stack(gate_up[:num_held]), kernel.stack(down[:num_held])
    actual = ops.experts(x, *held, *stacks, kernel.linear, ops.swiglu)
    all_of = kernel.stack(gate_up), kernel.stack(down)
    expected = ops.experts(x, weights.where(is_held, 0), chosen, *all_of, kernel.linear, ops.swiglu)
    assert_close(actual, expected, TOLERANCE[torch.bfloat16])


def test_experts_sum_the_chosen_ones_by_weight(any_ops: Ops) -> None:
    linear = reference.OPS.weights["fp32"].linear
    doubling = [torch.eye(4) * e for e in range(3)]  # expert e multiplies by e, then by e
    x = torch.randn(2, 4)
    weights, chosen = torch.tensor([[0.5, 0.25], [1.0, 2.0]]), torch.tensor([[2, 1], [0, 2]])
    actual = any_ops.experts(x, weights, chosen, doubling, doubling, linear, torch.clone)
    assert_close(actual, x * torch.tensor([[0.5 * 4 + 0.25], [2.0 * 4]]), TOLERANCE[torch.float32])


@pytest.mark.filterwarnings("ignore:this processor has no bf16")
@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize(("any_ops", "name"), PRODUCTS, indirect=["any_ops"])
def test_experts_add_what_all_tokens_share(any_ops: Ops, name: str, num_tokens: int) -> None:
    kernel, dtype = kernel_of(any_ops, name), torch.float32 if name == "fp32" else torch.bfloat16
    matrices = [[FORMATS[name].quantize(torch.randn(shape) * 0.1) for _ in range(4)] for shape in [(64, 64), (64, 32)]]
    gate_up, down = (kernel.stack([kernel.prepare(parts) for parts in of]) for of in matrices)
    x, shared = torch.randn(2, num_tokens, 64).to(dtype)
    weights, chosen = reference.route(torch.randn(num_tokens, 4), 2, "softmax", True)
    alone, together = (
        any_ops.experts(x, weights, chosen, gate_up, down, kernel.linear, any_ops.swiglu, shared=what)
        for what in (None, shared)
    )
    assert_close(together, alone + shared, TOLERANCE[dtype])


def test_experts_add_their_biases(any_ops: Ops) -> None:
    linear = reference.OPS.weights["fp32"].linear
    doubling = [torch.eye(4) * e for e in range(3)]
    x = torch.randn(2, 4)
    weights, chosen = torch.tensor([[0.5, 0.25], [1.0, 2.0]]), torch.tensor([[2, 1], [0, 2]])
    inner, outer = torch.randn(3, 4), torch.randn(3, 4)
    actual = any_ops.experts(x, weights, chosen, doubling, doubling, linear, torch.clone, inner, outer)
    of = [(x * e + inner[e]) * e + outer[e] for e in range(3)]  # what each expert makes of both rows
    expected = torch.stack([0.5 * of[2][0] + 0.25 * of[1][0], of[0][1] + 2 * of[2][1]])
    assert_close(actual, expected, TOLERANCE[torch.float32])
    shared = any_ops.experts(x, weights, chosen, doubling, doubling, linear, torch.clone, inner, outer, x)
    assert_close(shared, expected + x, TOLERANCE[torch.float32])
    without = any_ops.experts(x, weights, chosen, doubling, doubling, linear, torch.clone, inner)
    assert_close(without, expected - (outer[chosen] * weights[..., None]).sum(1), 2 * TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_clamped_gate_is_bounded_and_counts_up_from_one(any_ops: Ops, dtype: torch.dtype) -> None:
    gate, up = torch.tensor([-9.0, 0.5, 9.0]), torch.tensor([9.0, -9.0, 0.25])
    inner = torch.tensor([-9 * 4, 0.5 * -2, 3 * 1.25]) * torch.tensor([-9 * 1.7, 0.5 * 1.7, 3 * 1.7]).sigmoid()
    actual = any_ops.clamped_swiglu(torch.cat([gate, up])[None].to(dtype), 1.7, 3.0)
    assert_close(actual, inner[None].to(dtype), TOLERANCE[dtype])


def test_route_picks_the_largest_scores_and_the_lower_expert_on_ties(any_ops: Ops) -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0]])
    weights, chosen = any_ops.route(logits, 3, "softmax", False)
    assert chosen.tolist() == [[1, 3, 2]]
    assert_close(weights, logits.softmax(-1)[:, [1, 3, 2]], 1e-6)
    assert_close(any_ops.route(logits, 2, "sigmoid", False)[0], torch.tensor([[2.0, 2.0]]).sigmoid(), 1e-6)
    assert any_ops.route(logits, 2, "unit", False)[0].tolist() == [[1, 1]]
    assert any_ops.route(logits, 2, "softmax", True)[0].tolist() == [[0.5, 0.5]]
    with pytest.raises(ValueError, match="roulette"):
        any_ops.route(logits, 2, "roulette", False)


def test_route_looks_into_the_best_groups_only(any_ops: Ops) -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0, 4.0, 3.0, 3.5], [0.0, 1.0, 1.0, 0.0, 1.0, 0.0]])  # three groups of two
    weights, chosen = any_ops.route(logits, 3, "softmax", False, 2.0, num_groups=3, groups_chosen=2)
    assert chosen.tolist() == [[1, 3, 2], [1, 2, 0]]  # the lower group on ties
    assert_close(weights, 2 * logits.softmax(-1).gather(1, chosen), 1e-6)
    summed = any_ops.route(logits, 3, "softmax", True, 2.0, num_groups=3, groups_chosen=2)[0]
    assert_close(summed.sum(-1), torch.tensor([2.0, 2.0]), 1e-6)


@pytest.mark.parametrize(
    ("score", "num_groups", "groups_chosen"), [("sigmoid", 1, 1), ("sigmoid", 4, 2), ("unit", 3, 1)]
)
def test_a_bias_moves_the_choice_and_not_the_weights(
    any_ops: Ops, score: str, num_groups: int, groups_chosen: int
) -> None:
    """DeepSeek-V3's choice (arXiv 2412.19437, 2.1.2), expert by expert: groups by the sum of their two best."""
    logits, bias = torch.randn(20, 12), torch.randn(12)
    weights, chosen = any_ops.route(logits, 3, score, False, 2.5, num_groups, groups_chosen, bias)
    size = 12 // num_groups
    for row, own_weights, own in zip(logits.tolist(), weights, chosen.tolist(), strict=True):
        scores = [1 / (1 + math.exp(-one)) if score == "sigmoid" else 1.0 for one in row]
        ranks = [one + more for one, more in zip(scores, bias.tolist(), strict=True)]
        groups = [range(first, first + size) for first in range(0, 12, size)]
        best = sorted(groups, key=lambda group: -sum(sorted(ranks[expert] for expert in group)[-2:]))[:groups_chosen]
        eligible = sorted((expert for group in best for expert in group), key=lambda expert: -ranks[expert])
        assert own == eligible[:3]
        assert_close(own_weights, 2.5 * torch.tensor([scores[expert] for expert in own]), 1e-6)


# ------------------------------------------------------------------------------------------------------------- sampling


PLAIN = SamplingRow(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, uniform=0.5)
GREEDY = replace(PLAIN, temperature=0.0)


def distribution(logits: Tensor, settings: SamplingRow) -> list[tuple[int, float]]:
    """The tokens that may be drawn and their probabilities, likeliest first: the definition again, in plain Python."""
    ids = sorted((i for i in range(len(logits)) if logits[i] > -math.inf), key=lambda i: (-logits[i].item(), i))
    ids = ids[: settings.top_k or None]
    mass = [math.exp((logits[i].item() - logits[ids[0]].item()) / settings.temperature) for i in ids]
    before = [0.0, *itertools.accumulate(mass)]
    num_kept = sum(b < settings.top_p * before[-1] for b in before[:-1])
    kept = [(i, m) for i, m in zip(ids[:num_kept], mass, strict=False) if m >= settings.min_p]
    total = math.fsum(m for _, m in kept)
    return [(i, m / total) for i, m in kept]


SETTINGS = {
    "temperature alone": replace(PLAIN, temperature=0.7),
    "hot": replace(PLAIN, temperature=3.0),
    "top-k": replace(PLAIN, top_k=5),
    "top-k beyond the vocabulary": replace(PLAIN, top_k=10_000),
    "top-p": replace(PLAIN, top_p=0.8),
    "min-p": replace(PLAIN, min_p=0.1),
    "all of them": replace(PLAIN, temperature=1.5, top_k=20, top_p=0.9, min_p=0.05),
}


@pytest.mark.parametrize("vocab_size", [40, 5000])
@pytest.mark.parametrize("spread", [0.1, 3.0])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_each_token_is_drawn_by_the_uniforms_of_its_own_interval(
    any_ops: Ops, settings: SamplingRow, spread: float, vocab_size: int
) -> None:
    logits = torch.randn(vocab_size) * spread
    tokens, probabilities = zip(*distribution(logits, settings), strict=True)
    middles = [end - p / 2 for end, p in zip(itertools.accumulate(probabilities), probabilities, strict=True)]
    # fp32 softmaxes are off by up to 1e-6; a middle is far enough from both ends of its interval above 1e-5
    num_draws = 5 if any_ops.name == "triton" else 50  # its interpreter takes some 20 ms for each
    wide = [i for i, p in enumerate(probabilities) if p > 1e-5][:: max(1, len(tokens) // num_draws)]
    rows = [replace(settings, uniform=middles[i]) for i in wide]
    assert any_ops.sample(logits.expand(len(rows), -1), rows).tolist() == [tokens[i] for i in wide]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_drawn_tokens_follow_their_distribution(any_ops: Ops, settings: SamplingRow) -> None:
    num_draws = 20 if any_ops.name == "triton" else 1000  # its interpreter takes some 20 ms for each
    logits = torch.randn(40) * 2
    rows = [replace(settings, uniform=u) for u in torch.rand(num_draws, dtype=torch.float64).tolist()]
    counts = torch.bincount(any_ops.sample(logits.expand(num_draws, -1), rows), minlength=40)
    expected = {token: p * num_draws for token, p in distribution(logits, settings)}
    frequent = {token: n for token, n in expected.items() if n >= 5}  # the usual least for a chi-square cell
    assert counts.sum() - sum(int(counts[t]) for t in expected) == 0, "a token was drawn that may not be"
    chi_square = sum((int(counts[token]) - n) ** 2 / n for token, n in frequent.items())
    freedom = len(frequent)
    assert chi_square <= freedom + 4 * math.sqrt(
        2 * freedom
    )  # 4 sigma: one seed in 10,000 would fail, this one does not


def test_greedy_takes_the_largest_logit_and_the_lowest_id_on_ties(any_ops: Ops) -> None:
    logits = torch.zeros(3, 5000)
    logits[1, [4321, 17]] = 1.0
    logits[2, 9] = 1.0
    assert any_ops.sample(logits, [GREEDY] * 3).tolist() == [0, 17, 9]


def test_equal_logits_are_drawn_in_order_of_their_ids(any_ops: Ops) -> None:
    rows = [replace(PLAIN, uniform=(i + 0.5) / 5000) for i in (0, 1, 300, 4999)]
    assert any_ops.sample(torch.zeros(4, 5000), rows).tolist() == [0, 1, 300, 4999]


def test_top_k_cuts_ties_at_the_higher_ids(any_ops: Ops) -> None:
    assert any_ops.sample(torch.zeros(1, 5000), [replace(PLAIN, top_k=300, uniform=1 - 1e-12)]).tolist() == [299]


def test_the_last_uniform_draws_a_token_that_has_mass(any_ops: Ops) -> None:
    logits = torch.full((1, 600), -1000.0)
    logits[0, 33] = 0.0
    assert any_ops.sample(logits, [replace(PLAIN, uniform=math.nextafter(1, 0))]).tolist() == [33]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_largest_finite_logit_is_refused_alone(any_ops: Ops, temperature: float) -> None:
    logits = torch.randn(4, 6)
    logits[0, 3] = math.nan
    logits[1, 3] = math.inf
    logits[2] = -math.inf
    tokens = any_ops.sample(logits, [*[replace(PLAIN, temperature=temperature)] * 3, GREEDY]).tolist()
    assert tokens == [-1, -1, -1, int(logits[3].argmax())]


@pytest.mark.parametrize("settings", [GREEDY, PLAIN, SETTINGS["top-k"], SETTINGS["all of them"]])
@pytest.mark.parametrize("num_possible", [3, 100])
def test_tokens_with_a_logit_of_minus_infinity_are_never_chosen(
    any_ops: Ops, settings: SamplingRow, num_possible: int
) -> None:
    logits = torch.full((2, 600), -math.inf)
    possible = torch.randperm(600)[:num_possible]
    logits[:, possible] = torch.randn(num_possible)
    before = logits.clone()
    chosen = any_ops.sample(logits, [replace(settings, uniform=0.0), replace(settings, uniform=1 - 1e-12)])
    kept = [token for token, _ in distribution(logits[0], settings)] if settings.temperature else [chosen[0].item()]
    assert chosen.tolist() == [kept[0], kept[-1]]
    assert chosen[0] == logits[0].argmax()
    assert torch.equal(logits, before)


def test_a_row_gets_the_same_token_alone_and_in_company(any_ops: Ops) -> None:
    logits = torch.randn(32, 1000) * 2
    rows = [replace(s, uniform=u) for s, u in zip(itertools.cycle(SETTINGS.values()), torch.rand(32).tolist())]
    together = any_ops.sample(logits, rows).tolist()
    assert together == [any_ops.sample(logits[i : i + 1], rows[i : i + 1]).item() for i in range(32)]


def test_no_rows_draw_no_tokens(any_ops: Ops) -> None:
    assert any_ops.sample(torch.empty(0, 10), []).shape == (0,)


@pytest.mark.parametrize("num_top", [0, 1, 20, 300])
@pytest.mark.parametrize("vocab_size", [300, 5000])
@pytest.mark.parametrize("spread", [0, 1])  # of one row: 0 makes all its tokens equally likely
def test_logprobs_agree_with_the_definition_on_ties_too(ops: Ops, spread: int, vocab_size: int, num_top: int) -> None:
    logits = torch.randn(4, vocab_size).bfloat16().float()  # bf16 has many equal values
    logits[3] *= spread
    chosen = torch.tensor([0, 5, vocab_size - 1, 2])
    actual, expected = (table.logprobs(logits, chosen, num_top) for table in (ops, reference.OPS))
    assert torch.equal(actual[1], expected[1])
    assert_close(actual[0], expected[0], 1e-6)
    assert_close(actual[2], expected[2], 1e-6)


def test_logprobs_are_those_of_the_model(any_ops: Ops) -> None:
    chosen, ids, top = any_ops.logprobs(torch.tensor([[0.1, 0.6, 0.3]]).log(), torch.tensor([2]), 2)
    assert ids.tolist() == [[1, 2]]
    assert_close(torch.cat([chosen, top[0]]).exp(), torch.tensor([0.3, 0.6, 0.3]), 1e-6)


def test_logprobs_of_no_rows_are_empty(any_ops: Ops) -> None:
    chosen, ids, top = any_ops.logprobs(torch.empty(0, 10), torch.empty(0, dtype=torch.int64), 3)
    assert (chosen.shape, ids.shape, top.shape) == ((0,), (0, 3), (0, 3))
