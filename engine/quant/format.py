"""What a weight format is: a value, four facts and no behaviour of its own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class WeightFormat:
    """A way to keep a weight. `dequantize(quantize(weight))` is what every backend multiplies by."""

    bits: float  # of storage for each weight, scales included
    head: str  # the format of the output head beside it
    quantize: Callable[[Tensor], Mapping[str, Tensor]]  # weight (out, in) of any float dtype
    dequantize: Callable[[Mapping[str, Tensor]], Tensor]  # (out, in), fp32 or as stored
