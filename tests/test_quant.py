"""Weight formats keep weights as well as their bits allow."""

import pytest
import torch

from engine.quant import FORMATS
from kernels.weights import pack_int4, unpack_int4


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# Relative error of a Gaussian matrix with 576 inputs. fp32 is exact; bf16 keeps 8 bits of mantissa; int8 steps are 3.3
# sigma / 127 on average, so 3.3 / 127 / sqrt(12) = 0.0075; int4 steps 4.1 sigma / 15, so 4.1 / 15 / sqrt(12) = 0.079.
ERRORS = {"fp32": 0.0, "bf16": 2**-9, "int8": 0.008, "int4": 0.082}


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
def test_a_constant_row_stays_constant_to_a_hundredth(name: str, value: float) -> None:
    weight = torch.full((3, 32), value)
    kept = FORMATS[name].dequantize(FORMATS[name].quantize(weight)).float()
    assert torch.allclose(kept, weight, rtol=0.01, atol=0)  # bf16 rounds scale and zero point by up to 0.4 %


@pytest.mark.parametrize("name", FORMATS)
def test_bits_are_what_the_parts_take(name: str) -> None:
    weight = torch.randn(64, 4096)
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


def test_packed_nibbles_come_back_first_in_the_low_half() -> None:
    levels = torch.randint(0, 16, (3, 64))
    packed = pack_int4(levels)
    assert packed.shape == (3, 32)
    assert torch.equal(unpack_int4(packed).long(), levels)
    assert pack_int4(torch.tensor([[1, 2]])).tolist() == [[0x21]]
