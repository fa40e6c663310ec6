"""Triton's interpreter made honest about bf16: `install` before a kernel runs in it.

Owns the corrections to Triton 3.6 (and 3.9), which keeps bf16 as bit patterns, adds and multiplies these as integers,
and truncates where the device rounds. Here bf16 becomes fp32, is computed with, and is rounded back by torch, as the
device does it. What a device would refuse, the interpreter refuses too: operands of a product that are smaller than its
matrix instructions, or of two types. Not corrected but refused: sums and scans of bf16.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_Handle = interpreter.TensorHandle
_Builder = interpreter.InterpreterBuilder

# The device's least: mma.m16n8k16, whose 16 rows may be padding that the compiler adds.
_DOT_MIN = {"K": 16, "N": 8}


def install() -> None:
    """From now on the interpreter computes bf16 as a device does. A second call changes nothing."""
    if getattr(_Builder, "computes_bf16", False):
        return
    _Builder.computes_bf16 = True
    _Builder.cast_impl = _cast
    _Builder.create_fp_to_fp = lambda self, source, dtype, _rounding: _cast(self, source, dtype)
    _Builder.create_dot = _dot
    _Builder.create_fabs = lambda self, x: _rounded(np.abs(_exact(x)), x.dtype.scalar)
    _Builder.create_fma = lambda self, x, y, z: _rounded(_exact(x) * _exact(y) + _exact(z), z.dtype.scalar)
    for name in ("unary_op", "binary_op", "ternary_op"):
        setattr(_Builder, name, _through_fp32(getattr(_Builder, name)))
    for operation in (interpreter.ReduceOps, interpreter.ScanOps):
        operation.apply_impl = _refusing_bf16(operation.apply_impl)


def _exact(handle: Any) -> Any:
    """The values as numpy can compute with them."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    bits = np.ascontiguousarray(handle.data).view(np.int16)
    return torch.from_numpy(bits).view(torch.bfloat16).float().numpy()


def _rounded(values: Any, dtype: Any) -> Any:
    """Values as a handle of `dtype`, bf16 to nearest even."""
    if dtype != tl.bfloat16:
        return _Handle(np.asarray(values).astype(interpreter._get_np_dtype(dtype)), dtype)
    wide = torch.from_numpy(np.ascontiguousarray(np.asarray(values, dtype=np.float32)))
    return _Handle(wide.bfloat16().view(torch.int16).numpy().view(np.uint16), dtype)


def _cast(_builder: Any, source: Any, dtype: Any) -> Any:
    return _rounded(_exact(source), dtype.scalar)


def _through_fp32(original: Callable[..., Any]) -> Callable[..., Any]:
    """An elementwise operation that widens bf16 operands, and rounds what it returns where it is of their type."""

    def operate(self: Any, *operands_and_op: Any) -> Any:
        *operands, operation = operands_and_op
        dtype = operands[-1].dtype.scalar
        if dtype != tl.bfloat16:
            return original(self, *operands_and_op)
        result = np.asarray(operation(*map(_exact, operands)))
        return _Handle(result, tl.int1) if result.dtype == np.bool_ else _rounded(result, dtype)

    return operate


def _dot(_builder: Any, a: Any, b: Any, accumulator: Any, *_precision: Any) -> Any:
    if a.dtype.scalar != b.dtype.scalar:
        raise TypeError(f"tl.dot of {a.dtype.scalar} and {b.dtype.scalar}")
    if a.data.shape[-1] < _DOT_MIN["K"] or b.data.shape[-1] < _DOT_MIN["N"]:
        raise ValueError(f"tl.dot of {a.data.shape} and {b.data.shape} is below the device's least, {_DOT_MIN}")
    product = np.matmul(_exact(a), _exact(b), dtype=accumulator.data.dtype)
    return _Handle(product + accumulator.data, accumulator.dtype.scalar)


def _refusing_bf16(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply(self: Any, inputs: Any) -> Any:
        if any(x.dtype.scalar == tl.bfloat16 for x in inputs):
            raise TypeError("a sum or scan of bf16 is wrong in the interpreter: convert to fp32 first")
        return original(self, inputs)

    return apply
