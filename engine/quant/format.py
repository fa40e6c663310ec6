"""What a weight format is, and a weight as it is kept: values and few facts, no behaviour of their own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from kernels.weights import DEQUANTIZE


@dataclass(frozen=True)
class WeightFormat:
    """A way to keep a weight. `dequantize(quantize(weight))` is what every backend multiplies by."""

    layout: str  # of kernels/weights.py: what the parts are
    bits: float  # of storage for each weight, scales included, where rows are long
    head: str  # the format of the output head beside it
    quantize: Callable[[Tensor], Mapping[str, Tensor]]  # weight (out, in) of any float dtype
    num_groups: Callable[[int], int] = lambda _num_in: 1  # of `in`, that have a scale of their own in each row

    def dequantize(self, parts: Mapping[str, Tensor]) -> Tensor:
        """(out, in), fp32 or as stored."""
        return DEQUANTIZE[self.layout](parts)
