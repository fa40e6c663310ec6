"""Logits as integers of the same order, their keys: what searches for a place among them compares.

Owns the order that sampling and log probabilities share: falling logit, where -0 equals 0, rising id among equals.
"""

import triton
import triton.language as tl


@triton.jit
def read(row, V, first, BLOCK: tl.constexpr):
    """The logits from `first` on, and their keys: the bits, of negative ones inverted but for the sign."""
    place = first + tl.arange(0, BLOCK)
    number = tl.load(row + place, mask=place < V, other=float("-inf"))
    number = tl.where(number == 0, 0.0, number)  # -0 equals 0
    bits = number.to(tl.int32, bitcast=True)
    return number, bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def logit_of(key):
    """The logit that a key stands for."""
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
