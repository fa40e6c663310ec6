"""Weight formats: what a matrix becomes at load, one file per format.

Owns `FORMATS`, by the name that configuration uses. A format says how to quantize a weight (out, in) and what the
result stands for; how to multiply by it is the backend's affair (`Ops.weights`). `kernels/weights.py` has the layouts.
"""

from collections.abc import Mapping

from engine.quant import bf16, fp32, int4, int8
from engine.quant.format import WeightFormat

FORMATS: Mapping[str, WeightFormat] = {
    "fp32": fp32.FORMAT,
    "bf16": bf16.FORMAT,
    "int8": int8.FORMAT,
    "int4": int4.FORMAT,
}

__all__ = ["FORMATS", "WeightFormat"]
