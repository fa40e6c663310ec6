"""AWQ (arXiv 2306.00978) as AutoAWQ writes it for its "gemm" kernels.

A quantized layer has, in place of its weight,

    qweight  (in, out / 8) int32      a word holds eight neighbours along `out`, in an order of its own
    qzeros   (groups, out / 8) int32  as qweight
    scales   (groups, out)

and weight = (level - zero) * scale.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from msgspec import Struct
from torch import Tensor

from engine.models.hf_rope import require
from engine.quant import Kept
from engine.schemes.integers import keep_levels, unpack_words
from engine.schemes.scheme import FLOATS, Entries, Source, Stored, Wanted

BITS, PER_WORD = 4, 8
ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # in which place of a word the first of eight neighbours is, the second, ...


class AwqConfig(Struct, forbid_unknown_fields=True, kw_only=True):
    """`quantization_config`. What is `Any` says what the tensors say too, or is of no use."""

    quant_method: Literal["awq"]
    bits: Literal[4] = 4
    group_size: int = 128
    zero_point: Literal[True] = True
    version: Literal["gemm", "GEMM"] = "gemm"
    backend: Any = None
    do_fuse: Any = None
    exllama_config: Any = None
    fuse_max_seq_len: Any = None
    modules_to_fuse: Any = None
    modules_to_not_convert: Any = None

    def scheme(self) -> "Awq":
        """How such a checkpoint is stored. Raises ModelError for what we do not read."""
        require(self.group_size == -1 or self.group_size > 0, f"quantization_config.group_size {self.group_size}")
        return Awq(self.group_size)


@dataclass(frozen=True)
class Awq:
    """The scheme."""

    group_size: int  # -1: all of a row
    ignored: tuple[str, ...] = ()
    ignored_zeros: tuple[str, ...] = ()

    def source(self, wanted: Wanted, entries: Entries) -> Source | None:
        """Of what has a `qweight`."""
        module = wanted.module
        if f"{module}.qweight" not in entries:
            return None
        num_out, num_in = wanted.shape
        groups = 1 if self.group_size == -1 else num_in // self.group_size
        tensors = {
            "qweight": Stored(f"{module}.qweight", (num_in, num_out // PER_WORD), ("I32",)),
            "qzeros": Stored(f"{module}.qzeros", (groups, num_out // PER_WORD), ("I32",)),
            "scales": Stored(f"{module}.scales", (groups, num_out), FLOATS),
        }
        return Source(tensors, _unpack)


def _unpack(tensors: Mapping[str, Tensor]) -> Kept:
    levels, zero = (_in_order(unpack_words(tensors[name], BITS, dim=1)).t() for name in ("qweight", "qzeros"))
    return keep_levels(levels.contiguous(), zero, tensors["scales"].t().contiguous(), BITS)


def _in_order(fields: Tensor) -> Tensor:
    """(rows, out), each eight as they were before they were packed."""
    words = fields.view(len(fields), -1, PER_WORD)
    return words[..., torch.tensor(ORDER)].flatten(1)
