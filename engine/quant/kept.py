"""A weight as a checkpoint or the memory keeps it.

Owns the way from one to the other: what is stored as it is wanted stays as it is, to the bit; all else goes through
floats once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from engine.quant.format import WeightFormat
from kernels.weights import DEQUANTIZE, cut_inputs

# Rows of a matrix that are quantized at a time: it takes several times their memory in fp32, and a head has 150,000 of
# them. A multiple of the 128 rows that have scales together.
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Kept:
    """A weight's parts. The layout is one of kernels/weights.py, or "plain": {"weight": floats of any shape}."""

    layout: str
    parts: Mapping[str, Tensor]

    @classmethod
    def plain(cls, tensor: Tensor) -> Self:
        """A tensor of floats."""
        return cls("plain", {"weight": tensor})

    @property
    def num_groups(self) -> int:
        """In how many groups a row falls that have a scale of their own."""
        scale = self.parts.get("scale")
        return scale.shape[1] if scale is not None and scale.dim() > 1 else 1

    def floats(self) -> Tensor:
        """What it stands for: fp32, or as stored."""
        return self.parts["weight"] if self.layout == "plain" else DEQUANTIZE[self.layout](self.parts)

    def rows(self, order: Tensor) -> "Kept":
        """Its rows in another order, or some of them."""
        return Kept(self.layout, {name: part[order] for name, part in self.parts.items()})

    def cut(self, wanted: Sequence[range]) -> "Kept":
        """What is wanted of each dimension, in memory of its own. Raises ValueError where that would cut a group."""
        rows, *columns = wanted
        parts: Mapping[str, Tensor] = {name: part[rows.start : rows.stop] for name, part in self.parts.items()}
        for inputs in columns:
            parts = cut_inputs(self.layout, parts, inputs)
        return Kept(self.layout, {name: part.clone() for name, part in parts.items()})

    def to(self, device: torch.device) -> "Kept":
        """The same on the device."""
        return Kept(self.layout, {name: part.to(device) for name, part in self.parts.items()})

    def is_in(self, wanted: WeightFormat) -> bool:
        """Whether it is what the format would make of some matrix: of the layout, with groups of the size."""
        if self.layout != wanted.layout:
            return False
        q = self.parts.get("q")
        if q is None:
            return True
        num_in = q.shape[1] * (2 if q.dtype == torch.uint8 else 1)  # bytes of uint8 hold two
        return self.num_groups == wanted.num_groups(num_in)


def keep(stored: Kept, wanted: WeightFormat) -> Kept:
    """The matrix in the format, untouched where it is in it. Raises ValueError where the format cannot hold it."""
    if stored.is_in(wanted):
        return stored
    return _joined([Kept(wanted.layout, wanted.quantize(rows)) for rows in torch.split(stored.floats(), ROWS_AT_ONCE)])


def stack_rows(matrices: Sequence[Kept], dense: WeightFormat) -> Kept:
    """The matrices one below the other; in `dense`, where they are kept in different ways."""
    if len({(one.layout, one.num_groups) for one in matrices}) > 1:
        matrices = [keep(Kept.plain(one.floats()), dense) for one in matrices]
    return _joined(matrices)


def _joined(pieces: Sequence[Kept]) -> Kept:
    """The pieces, which are kept alike, one below the other; one alone is not copied."""
    first = pieces[0]
    if len(pieces) == 1:
        return first
    return Kept(first.layout, {name: torch.cat([piece.parts[name] for piece in pieces]) for name in first.parts})
