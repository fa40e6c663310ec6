"""What a scheme is: how one kind of checkpoint stores a parameter, and how that becomes a weight as we keep it.

Owns the values that pass between the loader, which knows files, and the schemes, which know layouts. A scheme reads
nothing: from the headers it says which tensors a parameter is stored in, so that all of them are checked before the
first is read, and it turns them into `Kept`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from msgspec import Struct
from torch import Tensor

from engine.models.names import Packed
from engine.models.parameters import Parameter
from engine.quant import Kept

FLOATS = ("F32", "BF16", "F16")  # by safetensors' names


class Entry(Struct):
    """Where a file's header says that a tensor is; of the header's `__metadata__` nothing is left."""

    dtype: str = ""
    shape: tuple[int, ...] = ()
    data_offsets: tuple[int, int] = (0, 0)


Entries = Mapping[str, Entry]  # of all files, by tensor name


@dataclass(frozen=True)
class Wanted:
    """A parameter, and where its architecture says that a checkpoint of floats has it."""

    parameter: Parameter
    shape: tuple[int, ...]
    name: str
    packed: Packed | None  # how the tensor holds it among others
    num_experts: int  # of its layer and role; 1 where it is no expert's

    @property
    def module(self) -> str:
        """The name of the layer whose `.weight` it is."""
        return self.name.removesuffix(".weight")

    @property
    def is_matrix(self) -> bool:
        """Whether it could be quantized: vectors are not."""
        return len(self.shape) == 2


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint as it has to be."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]  # safetensors' names: any of them


@dataclass(frozen=True)
class Source:
    """The tensors that a parameter comes from, by the names that `unpack` knows, and the way from them to it.

    `unpack` raises ValueError where their values make no sense.
    """

    tensors: Mapping[str, Stored]
    unpack: Callable[[Mapping[str, Tensor]], Kept]
    expert: int | None = None  # the one whose share of each tensor, along the first dimension, is read; None: all
    share: int = 1  # the parameter is one of so many in what is read
    is_as_kept: bool = False  # of any part of the tensor `unpack` makes that part of the parameter: no more is read


class Scheme(Protocol):
    """How a checkpoint is quantized."""

    @property
    def ignored(self) -> tuple[str, ...]:
        """Ends of the names of tensors that change nothing for us."""
        ...

    @property
    def ignored_zeros(self) -> tuple[str, ...]:
        """Ends of the names of tensors that change nothing where all of their numbers are zero."""
        ...

    def source(self, wanted: Wanted, entries: Entries, /) -> Source | None:
        """Where the parameter is, or None: in a tensor of floats under its own name."""
        ...


@dataclass(frozen=True)
class Plain:
    """Floats, as they were trained: also the parameters that other schemes leave alone."""

    ignored: tuple[str, ...] = ()
    ignored_zeros: tuple[str, ...] = ()

    def source(self, wanted: Wanted, _entries: Entries) -> Source:
        """The tensor of its name, or its share of one."""
        packed = wanted.packed
        if packed is None:
            tensors = {"weight": Stored(wanted.name, wanted.shape, FLOATS)}
            return Source(tensors, lambda parts: Kept("plain", parts), is_as_kept=True)
        return Source(
            {"weight": Stored(wanted.name, packed.shape(wanted.shape, wanted.num_experts), FLOATS)},
            lambda parts: Kept.plain(packed.part(parts["weight"])),
            wanted.parameter.expert,
            packed.step,
        )
