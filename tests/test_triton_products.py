"""Products by prepared weights are the definition's, in every regime; `test_kernels.py` has small ones."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from engine.quant import FORMATS
from kernels import reference
from kernels.ops import Linear, Ops
from kernels.triton import OPS, alignment, products, tiles, weights
from kernels.triton.multiply import multiply
from kernels.triton.quantize import quantize, rows_for
from kernels.triton.weights import Matrices
from kernels.triton.widen import widen
from kernels.weights import DEQUANTIZE, pack_nibbles
from tests.triton_machine_code import bf16, run_machine_code
from tests.triton_memory import far_rows, guarded

pytestmark = pytest.mark.usefixtures("interpreted")

# bf16: int4 weights, the gated product and each result are rounded, 2^-9 each; their errors are independent.
TOLERANCE = 2**-7
QUANTIZED = ["bf16", "int8", "int4", "mxfp4", "fp8", "fp8-blocks"]

# Rounding activations to e4m3 moves them by 2.6 % in the mean square, and so each product; experts have three.
FP8_TOLERANCE = 0.03
FP8_EXPERTS_TOLERANCE = 0.055


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert actual.shape == expected.shape
    difference = (actual.float() - expected.float()).norm() / expected.float().norm()
    assert difference <= tolerance, f"off by {difference:.2e}"


# --------------------------------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize("name", ["int4", "int4-g64", "int4-g128", "mxfp4"])
@pytest.mark.parametrize(("num_out", "num_in"), [(64, 128), (33, 256), (70, 64), (5, 96)])  # depths 128, 128, 64, 32
def test_four_bits_in_another_order_are_the_same_weight(num_out: int, num_in: int, name: str) -> None:
    parts = FORMATS[name].quantize(torch.randn(num_out, num_in))
    prepared = OPS.weights[FORMATS[name].layout].prepare(parts)
    assert torch.equal(widen(prepared), DEQUANTIZE[FORMATS[name].layout](parts).bfloat16())


def test_the_machine_code_makes_the_weights_that_the_interpreters_twin_makes() -> None:
    """All levels in all eight places, and scales whose product needs rounding, by a small model of the instructions."""
    word = torch.zeros(16, dtype=torch.int64)
    for place in range(8):
        word |= ((torch.arange(16) * 7 + place * 5) % 16) << (4 * place)
    scale, zero = (torch.randn(16).bfloat16().view(torch.int16).long() & 0xFFFF for _ in range(2))
    pairs = scale | (zero << 16)
    made = run_machine_code(weights._INT4_ASM.value, {"$8": word, "$9": pairs})
    for place in range(8):
        nibble = place // 2 + 4 * (place % 2)  # results in the order of (0, 16), (4, 20), ... of `_widen_int4`
        level = ((word >> (4 * nibble)) & 15) - 8
        expected = (level.float() * bf16(scale).float() + bf16(zero).float()).bfloat16()
        assert torch.equal(bf16(made[f"${place}"]), expected)


@pytest.mark.parametrize("exponent", [0, 1, 100, 127, 128, 200, 252])
def test_the_machine_code_makes_mxfp4s_weights(exponent: int) -> None:
    """All codes in all eight places, with scales from the least to where 6 times them is still finite."""
    codes = torch.stack([(torch.arange(16) * 7 + place * 5) % 16 for place in range(8)])
    word = torch.stack([code << (4 * place) for place, code in enumerate(codes)]).sum(0)
    parts = {"q": pack_nibbles(codes.T.repeat(1, 4)), "scale": torch.full((16, 1), exponent, dtype=torch.uint8)}
    scale = weights.prepare_mxfp4(parts).scales.flatten().long()
    made = run_machine_code(weights._MXFP4_ASM.value, {"$8": word, "$9": scale})
    expected = DEQUANTIZE["mxfp4"](parts).bfloat16()
    for place in range(8):
        assert torch.equal(bf16(made[f"${place}"]), expected[:, place // 2 + 4 * (place % 2)])


# ------------------------------------------------------------------------------------------------------------ alignment


@pytest.mark.parametrize("tokens", [16, 64])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "num_chosen"), [(1, 4, 1), (3, 8, 2), (40, 5, 3), (128, 100, 8), (129, 128, 8)]
)
def test_every_pair_has_a_place_in_a_tile_of_its_expert(
    num_tokens: int, num_experts: int, num_chosen: int, tokens: int
) -> None:
    chosen = torch.rand(num_tokens, num_experts).topk(num_chosen).indices
    chosen[: num_tokens // 2] = chosen[0].clone()  # some experts have many tokens
    aligned = alignment.align(chosen, num_experts, tokens)
    num_padded, num_pairs = int(aligned.num_padded), chosen.numel()
    assert num_padded <= aligned.num_blocks * tokens
    used = aligned.pairs[:num_padded].view(-1, tokens)
    assert used[used < num_pairs].sort().values.tolist() == list(range(num_pairs))
    assert (used < num_pairs).any(dim=1).all(), "no tile is empty"
    for tile, expert in zip(used, aligned.block_experts.tolist(), strict=False):
        pairs = tile[tile < num_pairs]
        assert (chosen.flatten()[pairs] == expert).all()
        assert pairs.tolist() == sorted(pairs.tolist()), "in the tokens' order: the same in every run"
    assert (aligned.pairs[num_padded:] == num_pairs).all()


# ------------------------------------------------------------------------------------------------------------- products


@dataclass(frozen=True)
class Case:
    num_tokens: int
    num_experts: int = 4
    num_chosen: int = 1
    hidden: int = 64
    intermediate: int = 64
    has_bias: bool = False
    gate: str = "swiglu"
    has_shared: bool = False


CASES = {
    "one token, unsorted": Case(1, num_experts=16, num_chosen=4),
    "one token of few experts": Case(1, num_experts=4, num_chosen=2),
    "tiles of 16": Case(20),
    "tiles of 32": Case(60, num_experts=3),
    "tiles of 64": Case(100, num_experts=2),
    "tiles of 128, in groups": Case(200, num_experts=2),
    "an expert nobody chose": Case(3, num_experts=30, num_chosen=3),
    "outputs that no tile divides": Case(20, num_experts=3, num_chosen=2, hidden=96, intermediate=160),
    "inputs in many pieces, split": Case(5, num_experts=2, intermediate=1024),
    "what all tokens share": Case(20, num_chosen=2, hidden=96, has_shared=True),
    "what all tokens share, inputs split": Case(2, num_experts=2, intermediate=1024, has_shared=True),
    "biases": Case(20, num_chosen=2, has_bias=True),
    "biases, and inputs split": Case(2, num_experts=2, intermediate=1024, has_bias=True),
    "a clamped gate": Case(20, num_chosen=2, gate="clamped"),
    "a clamped gate and biases": Case(2, num_experts=16, num_chosen=2, gate="clamped", has_bias=True),
    "a gate of another kind": Case(20, num_chosen=2, gate="of another kind"),
    "a gate of another kind, biases, inputs split": Case(
        2, num_experts=16, num_chosen=2, hidden=1024, gate="of another kind", has_bias=True
    ),
}


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_experts_are_the_definitions(case: Case, name: str) -> None:
    shapes = (2 * case.intermediate, case.hidden), (case.hidden, case.intermediate)
    parts = [[FORMATS[name].quantize(torch.randn(shape) * 0.1) for _ in range(case.num_experts)] for shape in shapes]
    inner_bias, outer_bias = (
        torch.randn(case.num_experts, shape[0]).bfloat16() if case.has_bias else None for shape in shapes
    )
    x = torch.randn(case.num_tokens, case.hidden).bfloat16()
    shared = torch.randn(case.num_tokens, 2 * case.hidden).bfloat16()[:, : case.hidden] if case.has_shared else None
    # Half of all tokens are of one mind, and no expert but the chosen ones has numbers.
    logits = torch.randn(case.num_tokens, case.num_experts)
    logits[::2] = logits[0].clone()
    chosen_weights, chosen = reference.route(logits, case.num_chosen, "softmax", True)
    layout = FORMATS[name].layout

    def mixed(table: Ops, x: Tensor, linear: Linear) -> Tensor:
        gate_up, down = (
            table.weights[layout].stack([table.weights[layout].prepare(part) for part in experts]) for experts in parts
        )
        activation = table.swiglu if case.gate == "swiglu" else partial(table.clamped_swiglu, alpha=1.7, limit=1.0)
        if case.gate == "of another kind":
            activation = halved_relu
        routed = x, chosen_weights, chosen, gate_up, down
        return table.experts(*routed, linear, activation, inner_bias, outer_bias, shared)

    actual = mixed(OPS, x, OPS.weights[layout].linear)
    assert actual.dtype == x.dtype
    if layout == "fp8":
        # From fp32: what is rounded to bf16 first now and then falls to the other side of a step of e4m3.
        assert_close(actual, mixed(reference.OPS, x.float(), linear_of_rounded_rows), tolerance=2 * TOLERANCE)
        assert_close(actual, mixed(reference.OPS, x, reference.linear), tolerance=FP8_EXPERTS_TOLERANCE)
    else:
        assert_close(actual, mixed(reference.OPS, x, reference.linear))


def halved_relu(inner: Tensor) -> Tensor:
    """An activation that no kernel knows."""
    return inner[:, : inner.shape[1] // 2].relu()


def linear_of_rounded_rows(x: Tensor, weight: Tensor) -> Tensor:
    return reference.linear(reference.quantize_rows_fp8(x), weight)


def test_the_cases_are_of_every_regime() -> None:
    """Else a tile of the table would be tested by none of them."""
    seen: dict[str, set[int]] = {name: set() for name in QUANTIZED}
    splits: set[int] = set()
    for name in QUANTIZED:
        for case in CASES.values():
            layout = FORMATS[name].layout
            tile = tiles.product_tile(
                layout, 128, case.num_tokens * case.num_chosen, case.num_experts, case.hidden, case.intermediate
            )
            seen[name].add(tile.tokens)
            splits.add(tile.splits)
    assert seen == {name: {one[0] for one in tiles._PRODUCT[FORMATS[name].layout].values()} for name in QUANTIZED}
    assert min(splits) == 1 < max(splits)


def test_stacked_matrices_are_a_sequence_of_themselves() -> None:
    values = torch.randn(3, 8, 16)
    each = list(Matrices("bf16", values, values, 8, 16))
    assert [torch.equal(one.values[0], matrix) for one, matrix in zip(each, values, strict=True)] == [True] * 3


def test_experts_that_nobody_chose_are_not_read() -> None:
    values = torch.full((4, 128, 64), torch.nan, dtype=torch.bfloat16)
    values[2] = torch.randn(128, 64)
    gate_up = Matrices("bf16", values, values, 128, 64)
    down = Matrices("bf16", values[:, :64].contiguous(), values, 64, 64)
    x, chosen = torch.randn(20, 64).bfloat16(), torch.full((20, 1), 2)
    output = products.experts(x, torch.ones(20, 1), chosen, gate_up, down, products.linear, OPS.swiglu)
    assert output.isfinite().all()


def test_a_choice_of_none_of_these_experts_is_not_computed() -> None:
    """One token, so unsorted. What would be read lies behind the last expert, and is there."""
    values = torch.randn(9, 64, 64).bfloat16()[:8]
    gate_up = Matrices("bf16", values, values, 64, 64)
    tile = tiles.product_tile("bf16", gate_up.depth, 2, 8, 64, 64)
    rows = rows_for("bf16", torch.randn(1, 64).bfloat16())
    with guarded():
        product = multiply(rows, gate_up, tile, 2, torch.tensor([[3, 8]]), None, 2)
    assert product[:, 0].float().isfinite().all()
    assert product[:, 1].float().isnan().all()


def test_experts_beyond_32_bits() -> None:
    values = far_rows(3, 128 * 64).as_strided((3, 128, 64), (2**30, 64, 1))
    gate_up, down = (Matrices("bf16", part, part, *part.shape[1:]) for part in (values, values[:, :64]))
    x, chosen = torch.randn(20, 64).bfloat16(), torch.full((20, 1), 2)
    actual = products.experts(x, torch.ones(20, 1), chosen, gate_up, down, products.linear, OPS.swiglu)
    near = values[2].float()
    assert_close(actual, reference.linear(reference.swiglu(reference.linear(x, near)), near[:64]))


@pytest.mark.parametrize("num_tokens", [1, 17, 128, 129])  # the last is widened
@pytest.mark.parametrize("name", ["int8", "int4", "int4-g128"])
def test_a_matrix_is_the_definitions(name: str, num_tokens: int) -> None:
    parts = FORMATS[name].quantize(torch.randn(200, 1152) * 0.1)
    x = torch.randn(num_tokens, 1152)
    kernel, definition = (table.weights[FORMATS[name].layout] for table in (OPS, reference.OPS))
    actual = kernel.linear(x, kernel.prepare(parts))
    assert actual.dtype == x.dtype
    assert_close(actual, definition.linear(x, definition.prepare(parts)))


@pytest.mark.parametrize("num_tokens", [1, 17, 70])
@pytest.mark.parametrize("name", ["fp8", "fp8-blocks"])
def test_a_matrix_of_fp8_is_the_definitions_of_rounded_rows(name: str, num_tokens: int) -> None:
    parts = FORMATS[name].quantize(torch.randn(200, 1100) * 0.1)
    x = torch.randn(num_tokens, 1100)
    x[:, 128:256] *= 100  # a group with another scale
    actual = OPS.weights["fp8"].linear(x, OPS.weights["fp8"].prepare(parts))
    weight = reference.OPS.weights["fp8"].prepare(parts)
    assert_close(actual, linear_of_rounded_rows(x, weight))
    assert_close(actual, reference.linear(x, weight), FP8_TOLERANCE)


@pytest.mark.parametrize("num_in", [64, 128, 1100, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_become_e4m3_by_groups(num_in: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 2 * num_in).to(dtype)[:, :num_in] * torch.tensor([[1e-30], [1.0], [1e30]]).to(dtype)
    x[1, : num_in // 2] = 0.0
    rows = quantize(x)
    assert rows.scales is not None
    wide = rows.values.float() * rows.scales.T.repeat_interleave(128, dim=1)[:, :num_in]
    assert torch.equal(wide, reference.quantize_rows_fp8(x))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_with_what_is_not_finite_gives_nothing_finite_and_the_others_do_not_notice(bad: float) -> None:
    parts = FORMATS["fp8"].quantize(torch.randn(70, 256))
    x = torch.randn(3, 256)
    good = x.clone()
    x[1, 200] = bad
    weight = OPS.weights["fp8"].prepare(parts)
    actual, expected = (OPS.weights["fp8"].linear(one, weight) for one in (x, good))
    assert not actual[1].isfinite().any()
    assert torch.equal(actual[[0, 2]], expected[[0, 2]])
