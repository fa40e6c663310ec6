"""What `tokenmill model convert` writes: each parameter under our own name, in the parts in which it is kept.

    <role>[.<layer>[.<expert>]].<layout>.<part>    expert.gate.3.17.int4.scale, norm.plain.weight

Owns the names; the parts are those of kernels/weights.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from msgspec import Struct
from torch import Tensor

from engine.models.parameters import Parameter
from engine.quant import Kept
from engine.schemes.scheme import FLOATS, Entries, Source, Stored, Wanted
from kernels.weights import DEQUANTIZE, FP8_GROUP, INT4_GROUP, MXFP4_GROUP

METHOD: Literal["tokenmill"] = "tokenmill"
VERSION: Literal[1] = 1  # of this layout: another number is refused


class OwnConfig(Struct, forbid_unknown_fields=True, kw_only=True):
    """`quantization_config`."""

    quant_method: Literal["tokenmill"]
    version: Literal[1]
    weights: Any = None  # for people: what it was converted to

    def scheme(self) -> "Own":
        """How such a checkpoint is stored."""
        return Own()


def tensor_names(parameter: Parameter, kept: Kept) -> Iterator[tuple[str, Tensor]]:
    """What its parts are called in a file."""
    for part, tensor in kept.parts.items():
        yield f"{_name(parameter)}.{kept.layout}.{part}", tensor


@dataclass(frozen=True)
class Own:
    """The scheme."""

    ignored: tuple[str, ...] = ()
    ignored_zeros: tuple[str, ...] = ()

    def source(self, wanted: Wanted, entries: Entries) -> Source:
        """By the parts that are there."""
        name = _name(wanted.parameter)
        possible = [one for one in DEQUANTIZE if wanted.is_matrix and wanted.shape[1] % _MULTIPLES.get(one, 1) == 0]
        layout = next((one for one in possible if f"{name}.{one}.{_FIRST.get(one, 'weight')}" in entries), "plain")
        tensors = {stored.name: stored for stored in _parts(layout, wanted.shape, f"{name}.{layout}", entries)}
        by_part = {stored.rpartition(".")[2]: tensor for stored, tensor in tensors.items()}
        return Source(by_part, lambda parts: Kept(layout, parts), is_as_kept=layout not in _FIRST)


_MULTIPLES = {"int4": INT4_GROUP, "mxfp4": MXFP4_GROUP}  # of inputs, that a layout needs
_FIRST = {"int8": "q", "int4": "q", "fp8": "q", "mxfp4": "q"}


def _name(parameter: Parameter) -> str:
    return ".".join(str(part) for part in parameter if part is not None)


def _parts(layout: str, shape: tuple[int, ...], name: str, entries: Entries) -> Iterator[Stored]:
    """The parts of kernels/weights.py, as they have to be for a parameter of the shape."""
    if layout not in _FIRST:
        dtypes = {"plain": FLOATS, "fp32": ("F32",), "bf16": ("BF16",)}[layout]
        yield Stored(f"{name}.weight", shape, dtypes)
        return
    num_out, num_in = shape
    match layout:
        case "int8":
            yield Stored(f"{name}.q", shape, ("I8",))
            yield Stored(f"{name}.scale", (num_out,), ("F32",))
        case "int4":
            groups = _num_groups(f"{name}.scale", entries, num_in)
            yield Stored(f"{name}.q", (num_out, num_in // 2), ("U8",))
            yield Stored(f"{name}.scale", (num_out, groups), ("BF16", "F32"))
            yield Stored(f"{name}.zero", (num_out, groups), ("BF16", "F32"))
        case "fp8":
            blocks = -(-num_in // FP8_GROUP)
            entry = entries.get(f"{name}.scale")
            yield Stored(f"{name}.q", shape, ("F8_E4M3",))
            yield Stored(f"{name}.scale", (num_out, 1 if entry and entry.shape == (num_out, 1) else blocks), ("F32",))
        case "mxfp4":
            yield Stored(f"{name}.q", (num_out, num_in // 2), ("U8",))
            yield Stored(f"{name}.scale", (num_out, num_in // MXFP4_GROUP), ("U8",))


def _num_groups(scale: str, entries: Entries, num_in: int) -> int:
    """As many as the scale has columns, where groups of a multiple of 32 can be so many."""
    entry = entries.get(scale)
    columns = entry.shape[1] if entry is not None and len(entry.shape) == 2 else 0
    most = num_in // INT4_GROUP
    return columns if columns and most % columns == 0 else most
