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
        if not wanted.is_matrix or f"{module}.qweight" not in entries:
            return None
        num_out, num_in = wanted.shape
        group = num_in if self.group_size == -1 else self.group_size
        groups, words = -(-num_in // group), -(-num_out // PER_WORD)
        tensors = {
            "qweight": Stored(f"{module}.qweight", (num_in, words), ("I32",)),
            "qzeros": Stored(f"{module}.qzeros", (groups, words), ("I32",)),
            "scales": Stored(f"{module}.scales", (groups, num_out), FLOATS),
        }

        def unpack(parts: Mapping[str, Tensor]) -> Kept:
            levels, zero = (_in_order(parts[name])[:, :num_out].t() for name in ("qweight", "qzeros"))
            return keep_levels(levels.contiguous(), zero, parts["scales"].t().contiguous(), BITS, group)

        return Source(tensors, unpack)


def _in_order(words: Tensor) -> Tensor:
    """The integers (rows, out) of words (rows, out / 8), each eight as they were before they were packed."""
    eights = unpack_words(words, BITS, dim=1).view(*words.shape, PER_WORD)
    return eights[..., torch.tensor(ORDER)].flatten(1)
