"""A norm before products in fp8 leaves what they would round rounded, to the bit, and no product does it again."""

import pytest
import torch

from engine.quant import FORMATS
from kernels import reference
from kernels.triton import OPS, quantize
from kernels.triton.norms import RoundingNorm
from kernels.triton.quantize import TwoForms

pytestmark = pytest.mark.usefixtures("interpreted")


def normed(num_tokens: int, size: int) -> TwoForms:
    """What a norm gives where a product in fp8 and one in bf16 read it, as long as that is what it should be."""
    x = torch.randn(num_tokens, 2 * size).bfloat16()[:, :size]
    residual, weight = torch.randn(num_tokens, size).bfloat16(), torch.randn(size).bfloat16()
    forms, total = OPS.add_rms_norm(x, residual, OPS.prepare_norm(weight, {"bf16", "fp8"}), 1e-5)
    plain, expected = OPS.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, expected)
    assert torch.equal(forms.plain, plain)
    return forms


@pytest.mark.parametrize("size", [1, 97, 128, 576, 2880])
@pytest.mark.parametrize("num_tokens", [0, 1, 3])
def test_a_norm_rounds_as_the_product_would(num_tokens: int, size: int) -> None:
    forms = normed(num_tokens, size)
    expected = quantize.quantize(forms.plain) if num_tokens else quantize.empty_rows(0, size, forms.plain.device)
    assert torch.equal(forms.rounded.values.view(torch.uint8), expected.values.view(torch.uint8))
    assert forms.rounded.scales is not None
    assert expected.scales is not None
    assert torch.equal(forms.rounded.scales, expected.scales)


def test_a_group_that_is_zero_stays_zero() -> None:
    x, weight = torch.zeros(1, 256).bfloat16(), torch.ones(256).bfloat16()
    x[0, 200] = 3.0
    forms, _ = OPS.add_rms_norm(x, torch.zeros_like(x), OPS.prepare_norm(weight, ["fp8"]), 1e-5)
    assert torch.equal(forms.rounded.values[0, :128].float(), torch.zeros(128))
    assert (forms.rounded.values[0].float() * forms.rounded.scales[:, 0].repeat_interleave(128)).argmax() == 200


@pytest.mark.parametrize("name", ["bf16", "int8", "int4", "mxfp4", "fp8", "fp8-blocks"])
def test_every_product_takes_what_a_norm_gives(name: str) -> None:
    forms, kernel = normed(3, 128), OPS.weights[FORMATS[name].layout]
    parts = [[FORMATS[name].quantize(torch.randn(shape) * 0.1) for _ in range(4)] for shape in ((256, 128), (128, 128))]
    matrix = kernel.prepare(parts[0][0])
    assert torch.equal(kernel.linear(forms, matrix), kernel.linear(forms.plain, matrix))
    gate_up, down = (kernel.stack([kernel.prepare(part) for part in experts]) for experts in parts)
    routed = reference.route(torch.randn(3, 4), 2, "softmax", True)
    ours, theirs = (OPS.experts(x, *routed, gate_up, down, kernel.linear, OPS.swiglu) for x in (forms, forms.plain))
    assert torch.equal(ours, theirs)


def test_a_norm_rounds_only_where_a_product_does() -> None:
    weight = torch.randn(64).bfloat16()
    assert OPS.prepare_norm(weight, {"bf16", "int4"}) is weight
    assert (
        OPS.prepare_norm(weight.float(), {"fp32", "fp8"}).dtype == torch.float32
    )  # for comparison: fp32 takes tensors
    assert isinstance(OPS.prepare_norm(weight, {"bf16", "fp8"}), RoundingNorm)
