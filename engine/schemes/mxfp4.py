"""GPT-OSS's MXFP4: the experts of a layer in one tensor of nibbles and one of exponents.

    <name>_blocks  (E, outs, in / 32, 16) uint8  two neighbours along `in` in a byte, the first in the low nibble
    <name>_scales  (E, outs, in / 32) uint8      exponents of two, 127 more

Outputs lie along the second dimension here, where the tensors of floats have them last; gate and up take turns alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from msgspec import Struct
from torch import Tensor

from engine.quant import Kept
from engine.schemes.scheme import Entries, Source, Stored, Wanted
from kernels.weights import MXFP4_GROUP


class Mxfp4Config(Struct, forbid_unknown_fields=True, kw_only=True):
    """`quantization_config`. What is `Any` says what the tensors say too."""

    quant_method: Literal["mxfp4"]
    modules_to_not_convert: Any = None
    dequantize: Any = None

    def scheme(self) -> "Mxfp4":
        """How such a checkpoint is stored."""
        return Mxfp4()


@dataclass(frozen=True)
class Mxfp4:
    """The scheme."""

    ignored: tuple[str, ...] = ()
    ignored_zeros: tuple[str, ...] = ()

    def source(self, wanted: Wanted, entries: Entries) -> Source | None:
        """Of experts' matrices in blocks."""
        packed = wanted.packed
        if packed is None or not wanted.is_matrix or f"{wanted.name}_blocks" not in entries:
            return None
        num_out, num_in = wanted.shape
        shape = (wanted.num_experts, num_out * packed.step, num_in // MXFP4_GROUP)
        tensors = {
            "q": Stored(f"{wanted.name}_blocks", (*shape, MXFP4_GROUP // 2), ("U8",)),
            "scale": Stored(f"{wanted.name}_scales", shape, ("U8",)),
        }

        def unpack(of_expert: Mapping[str, Tensor]) -> Kept:
            rows = {name: part[packed.start :: packed.step].contiguous() for name, part in of_expert.items()}
            return Kept("mxfp4", {"q": rows["q"].flatten(1), "scale": rows["scale"]})

        return Source(tensors, unpack, wanted.parameter.expert, packed.step)
