"""FP8 (e4m3) with a scale for each block of 128 x 128 (DeepSeek-V3, Qwen3), each row, or each tensor.

    <name>            (out, in) e4m3
    <name>_scale_inv  (out / 128, in / 128)   of blocks: what to multiply by, whatever its name says
    <name>_scale      (), (1,) or (out, 1)    of a tensor or of rows

Scales of activations are of no use to us: activations stay wider.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from msgspec import Struct
from torch import Tensor

from engine.models.hf_rope import require
from engine.quant import Kept
from engine.schemes.scheme import Entries, Source, Stored, Wanted
from kernels.weights import FP8_GROUP

E4M3 = "F8_E4M3"
SCALES = ("F32", "BF16", "F16")


class Fp8Config(Struct, forbid_unknown_fields=True, kw_only=True):
    """`quantization_config`. What is `Any` is about activations, or says what the tensors say too."""

    quant_method: Literal["fp8"]
    fmt: Literal["e4m3", "float8_e4m3fn"] = "e4m3"
    weight_block_size: list[int] | None = None
    scale_fmt: Literal["ue8m0"] | None = None  # scales are powers of two, of whichever dtype
    activation_scheme: Any = None
    kv_cache_scheme: Any = None
    ignored_layers: Any = None
    modules_to_not_convert: Any = None
    dequantize: Any = None

    def scheme(self) -> "Fp8":
        """How such a checkpoint is stored. Raises ModelError for what we do not read."""
        block = self.weight_block_size
        wanted = [FP8_GROUP, FP8_GROUP]
        require(block in (None, wanted), f"quantization_config.weight_block_size {block} is not {wanted}")
        return Fp8("_scale" if block is None else "_scale_inv", in_blocks=block is not None)


@dataclass(frozen=True)
class Fp8:
    """The scheme."""

    scale_suffix: str
    in_blocks: bool
    ignored: tuple[str, ...] = (".input_scale", ".activation_scale", ".k_scale", ".v_scale")
    ignored_zeros: tuple[str, ...] = ()

    def source(self, wanted: Wanted, entries: Entries) -> Source | None:
        """Of a tensor of e4m3."""
        entry = entries.get(wanted.name)
        if not wanted.is_matrix or entry is None or entry.dtype != E4M3:
            return None
        return fp8_source(wanted, entries, wanted.name + self.scale_suffix, in_blocks=self.in_blocks)


def fp8_source(wanted: Wanted, entries: Entries, scale_name: str, *, in_blocks: bool) -> Source:
    """A matrix of e4m3 and its scale, of whichever shape it is there."""
    num_out, num_in = wanted.shape
    blocks = (-(-num_out // FP8_GROUP), -(-num_in // FP8_GROUP))
    shapes: list[tuple[int, ...]] = [blocks] if in_blocks else [(num_out, 1), (), (1,), (1, 1), (num_out,)]
    tensors = {
        "q": Stored(wanted.name, wanted.shape, (E4M3,)),
        "scale": Stored(scale_name, one_of(shapes, scale_name, entries), SCALES),
    }
    return Source(tensors, lambda parts: _keep(parts, in_blocks=in_blocks))


def one_of(shapes: list[tuple[int, ...]], name: str, entries: Entries) -> tuple[int, ...]:
    """That of the tensor, where it is one of the shapes, else the first: what it should have been."""
    entry = entries.get(name)
    return entry.shape if entry is not None and entry.shape in shapes else shapes[0]


def _keep(parts: Mapping[str, Tensor], *, in_blocks: bool) -> Kept:
    q, scale = parts["q"], parts["scale"].float()
    by_row = scale.repeat_interleave(FP8_GROUP, dim=0)[: len(q)] if in_blocks else scale.reshape(-1, 1)
    return Kept("fp8", {"q": q, "scale": by_row.expand(len(q), -1).contiguous()})
