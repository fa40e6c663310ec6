"""The small kernels write what the definition says, all of it, and nothing else. Plain cases: `test_kernels.py`."""

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.cache import bytes_of, decode, row_size
from kernels.ops import HeadNorms
from kernels.triton import OPS
from tests.triton_memory import far_rows, guarded, poison

pytestmark = pytest.mark.usefixtures("interpreted")

DTYPES = [torch.float32, torch.bfloat16]

# fp32: the device's and numpy's exponentials and sums. bf16: the definition's bits, but for ties that these decide.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-12}


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    difference = (actual.float() - expected.float()).norm()
    assert difference <= TOLERANCE[actual.dtype] * expected.float().norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 16, 97, 576, 2880])
def test_norms_of_any_width(size: int, dtype: torch.dtype) -> None:
    x, residual = torch.randn(3, 2 * size).to(dtype)[:, :size], torch.randn(3, size).to(dtype)
    weight = torch.randn(size).to(dtype)
    assert_equal(OPS.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    for actual, expected in zip(
        OPS.add_rms_norm(x, residual, weight, 1e-5), reference.add_rms_norm(x, residual, weight, 1e-5), strict=True
    ):
        assert_equal(actual, expected)


def test_norms_of_heads() -> None:
    x, weight = torch.randn(3, 5, 24), torch.randn(24)
    assert_equal(OPS.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))


def test_rows_beyond_32_bits() -> None:
    x, weight = far_rows(3, 48), torch.randn(48).bfloat16()
    assert_equal(OPS.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    assert_equal(OPS.add_rms_norm(x, x, weight, 1e-5)[0], reference.add_rms_norm(x, x, weight, 1e-5)[0])
    assert_equal(OPS.swiglu(x), reference.swiglu(x))
    angle = torch.randn(3, 8)
    heads = x.unflatten(1, (3, 16))
    assert_equal(OPS.rotary(heads, angle.cos(), angle.sin()), reference.rotary(heads, angle.cos(), angle.sin()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 24, 97, 2500])
def test_swiglu_of_any_width(size: int, dtype: torch.dtype) -> None:
    gate_up = torch.randn(3, 2 * size + 1).to(dtype)[:, 1:] * 4
    assert_equal(OPS.swiglu(gate_up), reference.swiglu(gate_up))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "head_size"), [(1, 2), (5, 80), (12, 16), (36, 64), (3, 128)])
def test_rotary_of_some_of_a_rows_heads(num_heads: int, head_size: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, num_heads + 2, head_size).to(dtype)[:, 1:-1]
    angle = torch.randn(3, head_size // 2)
    assert_equal(OPS.rotary(x, angle.cos(), angle.sin()), reference.rotary(x, angle.cos(), angle.sin()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_groups", "head_size"), [(1, 8), (3, 20), (8, 384)])
def test_write_kv_of_some_of_a_rows_heads(num_groups: int, head_size: int, dtype: torch.dtype) -> None:
    rows = torch.randn(4, 2 * num_groups + 1, head_size)
    key, value = rows[:, :num_groups], rows[:, num_groups:-1]
    key_cache, value_cache = torch.empty(2, 5, 4, num_groups, head_size, dtype=dtype)
    slots = torch.tensor([17, 2, 3, 19])
    OPS.write_kv(key, value, key_cache, value_cache, slots)
    for cache, written in ((key_cache, key), (value_cache, value)):
        flat = cache.view(20, num_groups, head_size)
        assert torch.equal(flat[slots], written.to(dtype))
        assert flat.isnan().sum() == 16 * num_groups * head_size, "no other slot is written"


def test_write_kv_into_views_of_a_wider_cache() -> None:
    """A latent cache: the value is the first part of the key, and is kept once."""
    cache = torch.empty(5, 4, 1, 24)
    key = torch.randn(3, 1, 24)
    slots = torch.tensor([7, 0, 19])
    OPS.write_kv(key, key[..., :20], cache, cache[..., :20], slots)
    flat = cache.view(20, 1, 24)
    assert torch.equal(flat[slots], key)
    assert flat.isnan().sum() == 17 * 24


@pytest.mark.parametrize("kept", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize(("num_groups", "head_size"), [(1, 8), (3, 20), (8, 128)])
def test_write_kv_of_8_bits_is_the_definitions(num_groups: int, head_size: int, kept: torch.dtype) -> None:
    rows = torch.randn(5, 2 * num_groups, head_size) * torch.tensor([1.0, 1000.0, 1e-3, 0.0, 1.0]).view(5, 1, 1)
    rows[4, 0, 1], rows[4, -1, 2] = torch.inf, torch.nan
    slots = torch.tensor([17, 2, 3, 19, 0])
    caches = torch.full((2, 2, 5, 4, num_groups, row_size(head_size, kept)), -7, dtype=torch.int8).view(kept)
    for table, (keys, values) in zip((OPS, reference.OPS), caches, strict=True):
        table.write_kv(rows[:, :num_groups], rows[:, num_groups:], keys, values, slots)
    ours, definitions = (decode(one) for one in caches)
    torch.testing.assert_close(ours, definitions, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize(("num_heads", "num_groups", "head_size"), [(5, 2, 20), (32, 4, 64), (3, 1, 256)])
def test_heads_are_normed_rotated_and_written_as_the_definition_has_it(
    num_heads: int, num_groups: int, head_size: int, has_norms: bool, kept: torch.dtype
) -> None:
    heads = torch.randn(3, num_heads + 2 * num_groups + 1, head_size).bfloat16()[:, 1:] * 3
    norms = HeadNorms(torch.randn(head_size).bfloat16(), torch.randn(head_size).bfloat16(), 1e-5) if has_norms else None
    angle, slots = torch.randn(3, head_size // 2), torch.tensor([17, 2, 0])
    shape = 2, 2, 5, 4, num_groups, row_size(head_size, kept) * kept.itemsize
    caches = torch.full(shape, -7, dtype=torch.int8).view(kept)
    queries = [
        table.rotate_and_write(heads, norms, angle.cos(), angle.sin(), keys, values, slots)
        for table, (keys, values) in zip((OPS, reference.OPS), caches, strict=True)
    ]
    assert_equal(*queries)
    # A number that falls on the other side of a step moves by the whole of it.
    most = {torch.bfloat16: 2**-12, torch.float8_e4m3fn: 2**-6, torch.int8: 2**-8}[kept]
    ours, definitions = (decode(one) for one in caches)
    assert (ours - definitions).norm() <= most * definitions.norm()
    assert torch.equal(bytes_of(caches[0])[:, 1:4, 0, 0], bytes_of(caches[1])[:, 1:4, 0, 0])


def test_write_kv_beyond_32_bits() -> None:
    width = 64
    cache = far_rows(3, width)[::2]
    slots = torch.tensor([2**31 // width, 0])
    whole = cache.as_strided((2**31 // width + 1, 1, 1, width), (width, width, width, 1))
    values = torch.randn(2, 1, width).bfloat16()
    OPS.write_kv(values, values, whole, whole, slots)
    assert torch.equal(cache, values[[1, 0], 0])


def test_the_guard_sees_a_write_beside_a_tensor() -> None:
    def write_one_too_many() -> None:
        with guarded():
            inside = torch.empty(4, dtype=torch.int32)
            assert (inside == poison(torch.int32)).all()
            inside.as_strided((5,), (1,))[4] = 1

    with pytest.raises(AssertionError, match="beside a tensor"):
        write_one_too_many()
