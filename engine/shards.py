"""Files of tensors in the format safetensors, read piece by piece into memory.

Owns the reading. What is mapped would count as ours until the last piece is done, so nothing is. What the tensors mean
is the affair of `engine/loader.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from math import prod
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.errors import ModelError
from engine.models.parts import Cut
from engine.schemes import Entry

PIECE_BYTES = 16 << 20  # read at once of a matrix of which only some columns are wanted: ten milliseconds' worth

DTYPES = {  # what we read, by safetensors' names
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}


class Shard:
    """One open file."""

    def __init__(self, file: BufferedReader) -> None:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = msgspec.json.decode(file.read(header_bytes), type=dict[str, Entry])
        self.entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        self._file = file
        self._start = 8 + header_bytes

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        entry = self.entries[name]
        return self._read(entry, entry.shape, 0)

    def read_one(self, name: str, index: int) -> Tensor:
        """`tensor[index]`, and no more of it."""
        entry = self.entries[name]
        return self._read(entry, entry.shape[1:], index * prod(entry.shape[1:]))

    def read_cut(self, name: str, wanted: Cut) -> Tensor:
        """What is wanted of each of the tensor's dimensions, and little more in memory."""
        entry, rows, columns = self.entries[name], wanted[0], wanted[1:]
        whole_row, row = entry.shape[1:], tuple(map(len, columns))
        size = prod(whole_row)
        if row == whole_row:
            return self._read(entry, (len(rows), *row), rows.start * size)
        tensor = torch.empty(len(rows), *row, dtype=DTYPES[entry.dtype])
        inner = tuple(slice(one.start, one.stop) for one in columns)
        step = max(1, PIECE_BYTES // (size * tensor.itemsize))
        for first in range(0, len(rows), step):
            some = tensor[first : first + step]
            some.copy_(self._read(entry, (len(some), *whole_row), (rows.start + first) * size)[:, *inner])
        return tensor

    def _read(self, entry: Entry, shape: tuple[int, ...], first: int) -> Tensor:
        """As many numbers as the shape has, from number `first` of the tensor on."""
        tensor = torch.empty(shape, dtype=DTYPES[entry.dtype])
        self._file.seek(self._start + entry.data_offsets[0] + first * tensor.itemsize)
        if self._file.readinto(tensor.view(-1).view(torch.uint8).numpy().data) != tensor.nbytes:
            raise ModelError(f"{self._file.name} has become shorter while it was read")
        return tensor


@contextmanager
def open_shard(file: Path) -> Iterator[Shard]:
    """The file open and its header checked: its tensors neither overlap nor reach beyond the file."""
    if not file.is_file():
        raise ModelError(f"{file} is missing: only safetensors are read, and the download may be incomplete")
    try:
        with safe_open(file, framework="pt"):
            pass  # the check is all we want of it
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: {error}") from error
    with file.open("rb") as opened:
        yield Shard(opened)
