"""Weight formats keep weights as well as their bits allow."""

import pytest
import torch

from engine.quant import FORMATS
from engine.quant.kept import ROWS_AT_ONCE, Kept, keep, stack_rows
from kernels.weights import dequantize_int4, int4_by, pack_nibbles, unpack_nibbles


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# Relative error of a Gaussian matrix with 576 inputs. fp32 is exact; bf16 keeps 8 bits of mantissa; int8 steps are 3.3
# sigma / 127 on average, so 3.3 / 127 / sqrt(12) = 0.0075. An int4 step is a fifteenth of a group's range, which for
# 32 and 64 numbers is 4.1 and 4.7 sigma, so 4.1 / 15 / sqrt(12) = 0.079, and 0.090 (576 does not fall into groups of
# 128). e4m3 has 8 steps between two powers of two, of which a number is 1.35 times the lower on average:
# 1 / 8 / 1.35 / sqrt(12) = 0.027 whatever the scale. e2m1 has two, four times that, and cuts off above 6.
ERRORS = {
    "fp32": 0.0,
    "bf16": 2**-9,
    "int8": 0.008,
    "fp8": 0.028,
    "fp8-blocks": 0.028,
    "int4": 0.082,
    "int4-g64": 0.093,
    "int4-g128": 0.093,
    "mxfp4": 0.125,
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_error_is_that_of_even_rounding(name: str) -> None:
    weight = torch.randn(128, 576)
    kept = FORMATS[name].dequantize(FORMATS[name].quantize(weight)).float()
    assert (kept - weight).norm() / weight.norm() <= ERRORS[name]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_float_is_taken_and_the_shape_kept(name: str, dtype: torch.dtype) -> None:
    weight = torch.randn(5, 64).to(dtype)
    assert FORMATS[name].dequantize(FORMATS[name].quantize(weight)).shape == weight.shape


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [0.0, 1.5, -3.0, 1e-30])
def test_a_constant_row_stays_constant(name: str, value: float) -> None:
    weight = torch.full((3, 32), value)
    kept = FORMATS[name].dequantize(FORMATS[name].quantize(weight)).float()
    # bf16 rounds scale and zero point by up to 0.4 %; of a group's largest magnitude, e2m1 has but 4 and 6 for 4 .. 8.
    assert torch.allclose(kept, weight, rtol=0.25 if name == "mxfp4" else 0.01, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_bits_are_what_the_parts_take(name: str) -> None:
    weight = torch.randn(128, 4096)
    num_bytes = sum(part.numel() * part.element_size() for part in FORMATS[name].quantize(weight).values())
    assert num_bytes * 8 / weight.numel() == pytest.approx(
        FORMATS[name].bits, rel=0.001
    )  # int8: a scale for each 4,096


def test_int8_is_off_by_at_most_a_step() -> None:
    weight = torch.randn(64, 96)
    weight[0, 0] = 1000.0  # an outlier spoils its own row alone
    parts = FORMATS["int8"].quantize(weight)
    error = (FORMATS["int8"].dequantize(parts) - weight).abs()
    assert (error[:, 1:] <= 0.51 * parts["scale"][:, None]).all()
    assert (error <= parts["scale"][:, None]).all()  # the largest of a row, where bf16 rounded its scale down
    assert torch.equal(parts["scale"].bfloat16().float(), parts["scale"])


def test_int8_is_symmetric() -> None:
    weight = torch.randn(8, 32)
    positive, negative = (FORMATS["int8"].quantize(w)["q"] for w in (weight, -weight))
    assert torch.equal(positive, -negative)


def test_int4_is_off_by_at_most_a_step_of_its_group() -> None:
    weight = torch.randn(64, 96)
    weight[0, 40] = 1000.0
    parts = FORMATS["int4"].quantize(weight)
    error = (FORMATS["int4"].dequantize(parts) - weight).abs().view(64, 3, 32).amax(dim=2)
    assert (error <= parts["scale"].float()).all()


def test_int4_takes_whole_groups_alone_and_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="multiple of 32 input features, not 40: use int8"):
        FORMATS["int4"].quantize(torch.randn(4, 40))


def test_larger_groups_of_int4_repeat_to_groups_of_32() -> None:
    parts = FORMATS["int4-g128"].quantize(torch.randn(5, 384))
    assert parts["scale"].shape == (5, 3)
    assert torch.equal(dequantize_int4(int4_by(parts, 32)), dequantize_int4(parts))


@pytest.mark.parametrize(("num_in", "groups"), [(256, 2), (192, 3), (96, 3)])
def test_groups_are_as_large_as_the_inputs_fall_into(num_in: int, groups: int) -> None:
    parts = FORMATS["int4-g128"].quantize(torch.randn(2, num_in))
    assert parts["scale"].shape == (2, groups)
    assert Kept("int4", parts).is_in(FORMATS["int4-g128"])


def test_fp8_puts_the_largest_of_a_row_or_block_at_448() -> None:
    weight = torch.randn(200, 300)
    weight[150, 290] = 1000.0  # an outlier spoils its own row, or its own block
    for name in ("fp8", "fp8-blocks"):
        parts = FORMATS[name].quantize(weight)
        assert parts["q"].float().abs().max() == 448
        error = (FORMATS[name].dequantize(parts) - weight).abs() / weight.abs()
        error[150] = 0
        if name == "fp8-blocks":
            assert parts["scale"].shape == (200, 3)
            assert (parts["scale"][:128] == parts["scale"][0]).all()
            error[128:, 256:] = 0
        normal = weight.abs() > 4 * 2**-6 / 448  # of magnitudes up to 4: below 2^-6 of the scale e4m3 has fewer bits
        assert error[normal].max() <= 2**-4


def test_mxfp4_keeps_its_sixteen_numbers_at_every_power_of_two() -> None:
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6] * 2)
    weight = torch.ldexp(numbers.expand(4, 32), torch.tensor([[-120], [-3], [0], [100]]))
    parts = FORMATS["mxfp4"].quantize(weight)
    assert torch.equal(FORMATS["mxfp4"].dequantize(parts), weight)
    assert parts["scale"].flatten().tolist() == [7, 124, 127, 227]
    assert torch.equal(weight, FORMATS["mxfp4"].dequantize(parts).bfloat16().float())


def test_what_is_kept_as_it_is_wanted_stays_as_it_is() -> None:
    weight = torch.randn(8, 256)
    for name, wanted in FORMATS.items():
        kept = keep(Kept.plain(weight), wanted)
        assert keep(kept, wanted) is kept
        others = [other for other in FORMATS if other != name]
        assert not any(kept.is_in(FORMATS[other]) for other in others)


@pytest.mark.parametrize("name", FORMATS)
def test_a_matrix_is_what_it_would_be_in_one_piece(name: str) -> None:
    weight = torch.randn(ROWS_AT_ONCE + 200, 128)
    parts = FORMATS[name].quantize(weight)
    kept = keep(Kept.plain(weight), FORMATS[name])
    assert kept.parts.keys() == parts.keys()
    assert all(torch.equal(kept.parts[part], value) for part, value in parts.items())


@pytest.mark.parametrize("name", FORMATS)
def test_rows_put_together_are_what_they_were(name: str) -> None:
    above, below = (keep(Kept.plain(torch.randn(rows, 256)), FORMATS[name]) for rows in (3, 200))
    whole = stack_rows([above, below], FORMATS["fp32"])
    assert whole.layout == FORMATS[name].layout
    assert torch.equal(whole.floats(), torch.cat([above.floats(), below.floats()]))
    order = torch.tensor([5, 0, 100])
    assert torch.equal(whole.rows(order).floats(), whole.floats()[order])


def test_rows_kept_in_different_ways_are_put_together_as_floats() -> None:
    above, below = (keep(Kept.plain(torch.randn(4, 256)), FORMATS[name]) for name in ("int4", "int4-g64"))
    whole = stack_rows([above, below], FORMATS["fp32"])
    assert whole.layout == "fp32"
    assert torch.equal(whole.floats(), torch.cat([above.floats(), below.floats()]))


def test_packed_nibbles_come_back_first_in_the_low_half() -> None:
    levels = torch.randint(0, 16, (3, 64))
    packed = pack_nibbles(levels)
    assert packed.shape == (3, 32)
    assert torch.equal(unpack_nibbles(packed).long(), levels)
    assert pack_nibbles(torch.tensor([[1, 2]])).tolist() == [[0x21]]
