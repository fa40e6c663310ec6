"""Weight formats: what a matrix becomes at load, one file per layout.

Owns `FORMATS`, by the name that configuration uses. A format says how to quantize a weight (out, in) and what the
result stands for; how to multiply by it is the backend's affair (`Ops.weights`). `kernels/weights.py` has the layouts.
"""

from collections.abc import Mapping

import torch

from engine.quant import bf16, fp8, fp32, int4, int8, mxfp4
from engine.quant.format import WeightFormat
from engine.quant.kept import Kept, keep, stack_rows

FORMATS: Mapping[str, WeightFormat] = {
    "fp32": fp32.FORMAT,
    "bf16": bf16.FORMAT,
    "int8": int8.FORMAT,
    "fp8": fp8.PER_ROW,
    "fp8-blocks": fp8.IN_BLOCKS,
    "int4": int4.FORMAT,
    "int4-g64": int4.FORMAT_64,
    "int4-g128": int4.FORMAT_128,
    "mxfp4": mxfp4.FORMAT,
}

DENSE_FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16"}  # by the dtype of activations beside them

__all__ = ["DENSE_FORMATS", "FORMATS", "Kept", "WeightFormat", "keep", "stack_rows"]
