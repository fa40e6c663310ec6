"""Triton's interpreter made honest about bf16 and fp8: `install` before a kernel runs in it.

Owns the corrections to Triton 3.6 (and 3.9), which keeps such numbers as bit patterns, adds and multiplies these as
integers, and truncates where the device rounds. Here they become fp32, are computed with, and are rounded back by
torch, as the device does it: e4m3 beyond its largest number becomes that (`cvt.rn.satfinite`). What a device would
refuse, the interpreter refuses too: operands of a product that are smaller than its matrix instructions, or of two
types. Not corrected but refused: sums and scans of such numbers.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_Handle = interpreter.TensorHandle
_Builder = interpreter.InterpreterBuilder

# The device's least: mma.m16n8k16, whose 16 rows may be padding that the compiler adds; of 8 bits, m16n8k32.
_DOT_MIN = {"K": 16, "N": 8}
_DOT_MIN_8_BITS = {"K": 32, "N": 8}

_NARROW = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn}
_BITS = {1: (torch.uint8, np.uint8), 2: (torch.int16, np.uint16)}  # by bytes: as torch and as the interpreter have them


def install() -> None:
    """From now on the interpreter computes bf16 and fp8 as a device does. A second call changes nothing."""
    if getattr(_Builder, "computes_narrow", False):
        return
    _Builder.computes_narrow = True
    _Builder.cast_impl = _cast
    _Builder.create_fp_to_fp = lambda self, source, dtype, _rounding: _cast(self, source, dtype)
    _Builder.create_dot = _dot
    _Builder.create_fabs = lambda self, x: _rounded(np.abs(_exact(x)), x.dtype.scalar)
    _Builder.create_fma = lambda self, x, y, z: _rounded(_exact(x) * _exact(y) + _exact(z), z.dtype.scalar)
    for name in ("unary_op", "binary_op", "ternary_op"):
        setattr(_Builder, name, _through_fp32(getattr(_Builder, name)))
    for operation in (interpreter.ReduceOps, interpreter.ScanOps):
        operation.apply_impl = _refusing_narrow(operation.apply_impl)


def _exact(handle: Any) -> Any:
    """The values as numpy can compute with them."""
    dtype = _NARROW.get(handle.dtype.scalar)
    if dtype is None:
        return handle.data
    bits = np.ascontiguousarray(handle.data)
    return torch.from_numpy(bits.view(f"i{bits.itemsize}")).view(dtype).float().numpy()


def _rounded(values: Any, dtype: Any) -> Any:
    """Values as a handle of `dtype`, bf16 and e4m3 to nearest even."""
    narrow = _NARROW.get(dtype)
    if narrow is None:
        return _Handle(np.asarray(values).astype(interpreter._get_np_dtype(dtype)), dtype)
    wide = torch.from_numpy(np.ascontiguousarray(np.asarray(values, dtype=np.float32)))
    if narrow == torch.float8_e4m3fn:
        most = torch.finfo(narrow).max
        wide = wide.clamp(-most, most)
    as_torch, as_numpy = _BITS[narrow.itemsize]
    return _Handle(wide.to(narrow).view(as_torch).numpy().view(as_numpy), dtype)


def _cast(_builder: Any, source: Any, dtype: Any) -> Any:
    return _rounded(_exact(source), dtype.scalar)


def _through_fp32(original: Callable[..., Any]) -> Callable[..., Any]:
    """An elementwise operation that widens narrow operands, and rounds what it returns where it is of their type."""

    def operate(self: Any, *operands_and_op: Any) -> Any:
        *operands, operation = operands_and_op
        dtype = operands[-1].dtype.scalar
        if dtype not in _NARROW:
            return original(self, *operands_and_op)
        result = np.asarray(operation(*map(_exact, operands)))
        return _Handle(result, tl.int1) if result.dtype == np.bool_ else _rounded(result, dtype)

    return operate


def _dot(_builder: Any, a: Any, b: Any, accumulator: Any, *_precision: Any) -> Any:
    if a.dtype.scalar != b.dtype.scalar:
        raise TypeError(f"tl.dot of {a.dtype.scalar} and {b.dtype.scalar}")
    least = _DOT_MIN_8_BITS if a.dtype.scalar == tl.float8e4nv else _DOT_MIN
    if a.data.shape[-1] < least["K"] or b.data.shape[-1] < least["N"]:
        raise ValueError(f"tl.dot of {a.data.shape} and {b.data.shape} is below the device's least, {least}")
    product = np.matmul(_exact(a), _exact(b), dtype=accumulator.data.dtype)
    return _Handle(product + accumulator.data, accumulator.dtype.scalar)


def _refusing_narrow(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply(self: Any, inputs: Any) -> Any:
        if any(x.dtype.scalar in _NARROW for x in inputs):
            raise TypeError("a sum or scan of bf16 or fp8 is wrong in the interpreter: convert to fp32 first")
        return original(self, inputs)

    return apply
