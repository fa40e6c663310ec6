"""compressed-tensors, as llm-compressor writes it: integers of 8 bits, or of 4 and 8 in words, and FP8.

    pack-quantized   weight_packed (out, in * bits / 32) int32   a word holds neighbours along `in`, plus the middle
                     weight_zero_point (out * bits / 32, groups) int32, along `out`; weight_g_idx (in,): order by
                     activation
    int-quantized    weight (out, in) int8, weight_zero_point as weight_scale
    float-quantized  weight (out, in) e4m3
    all              weight_scale (out, groups), (out, 1), (1,), or of blocks of 128 x 128

Which of them a matrix is, in which groups, with which bits: its tensors say so.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from msgspec import Struct
from torch import Tensor

from engine.models.hf_rope import require
from engine.quant import Kept
from engine.schemes.fp8 import E4M3, fp8_source, one_of
from engine.schemes.integers import INT8_MIDDLE, WORD_BITS, keep_levels, unpack_words
from engine.schemes.scheme import FLOATS, Entries, Source, Stored, Wanted
from kernels.weights import FP8_GROUP

_FORMATS = Literal["pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision"]


class WeightArgs(Struct, forbid_unknown_fields=True, kw_only=True):
    """How a group's weights are quantized."""

    num_bits: Literal[4, 8]
    type: Literal["int", "float"] = "int"
    strategy: Literal["tensor", "channel", "group", "block"] | None = None
    symmetric: bool = True
    dynamic: Literal[False] = False
    group_size: int | None = None
    block_structure: list[int] | None = None
    actorder: Any = None  # the tensors say
    observer: Any = None  # how scales were found
    observer_kwargs: Any = None
    scale_dtype: Any = None  # the tensors say
    zp_dtype: Any = None

    def check(self, of: str) -> None:
        """Raise ModelError for what the layouts above do not hold."""
        require(self.type == "int" or self.num_bits == 8, f"{of}: floats of {self.num_bits} bits are not supported")
        block, wanted = self.block_structure, [FP8_GROUP, FP8_GROUP]
        if self.strategy == "block":
            require(self.type == "float", f"{of}: blocks of integers are not supported")
            require(block == wanted, f"{of}: block_structure {block} is not {wanted}")


class Group(Struct, forbid_unknown_fields=True, kw_only=True):
    """Layers that are quantized alike."""

    targets: Any = None  # the tensors say
    weights: WeightArgs | None = None
    input_activations: Any = None  # ours stay wider
    output_activations: Any = None
    format: _FORMATS | None = None


class CompressedConfig(Struct, forbid_unknown_fields=True, kw_only=True):
    """`quantization_config`. What is `Any` says what the tensors say too, or is of no use."""

    quant_method: Literal["compressed-tensors"]
    config_groups: dict[str, Group]
    format: _FORMATS
    quantization_status: Literal["compressed"] = "compressed"
    sparsity_config: dict[str, Any] | None = None
    moe_sparsity_config: None = None
    transform_config: dict[str, Any] | None = None
    global_compression_ratio: Any = None
    ignore: Any = None
    kv_cache_scheme: Any = None  # our cache's format is a setting
    version: Any = None

    def scheme(self) -> "Compressed":
        """How such a checkpoint is stored. Raises ModelError for what we do not read."""
        for name, group in self.config_groups.items():
            if group.weights is not None:
                group.weights.check(f"quantization_config.config_groups.{name}.weights")
        sparsity = (self.sparsity_config or {}).get("format", "dense")
        require(sparsity == "dense", f"quantization_config.sparsity_config.format {sparsity!r} is not supported")
        require(not self.transform_config, "quantization_config.transform_config is not supported: weights are rotated")
        blocks = {g.weights.strategy == "block" for g in self.config_groups.values() if g.weights}
        return Compressed(in_blocks=blocks == {True})


@dataclass(frozen=True)
class Compressed:
    """The scheme."""

    in_blocks: bool  # FP8 with a scale for each
    ignored: tuple[str, ...] = (".weight_shape", ".input_scale", ".input_zero_point", ".k_scale", ".v_scale")
    ignored_zeros: tuple[str, ...] = ()

    def source(self, wanted: Wanted, entries: Entries) -> Source | None:
        """By the tensors that are there."""
        if not wanted.is_matrix:
            return None
        if f"{wanted.module}.weight_packed" in entries:
            return _in_words(wanted, entries)
        entry = entries.get(wanted.name)
        if entry is not None and entry.dtype == "I8":
            return _in_bytes(wanted, entries)
        if entry is not None and entry.dtype == E4M3:
            return fp8_source(wanted, entries, f"{wanted.module}.weight_scale", in_blocks=self.in_blocks)
        return None


def _in_words(wanted: Wanted, entries: Entries) -> Source:
    module, (num_out, num_in) = wanted.module, wanted.shape
    packed = f"{module}.weight_packed"
    bits = 8 if entries[packed].shape == (num_out, num_in // 4) else 4
    per_word, groups = WORD_BITS // bits, _num_groups(wanted, entries)
    tensors = {
        "packed": Stored(packed, (num_out, -(-num_in // per_word)), ("I32",)),
        "scale": Stored(f"{module}.weight_scale", (num_out, groups), FLOATS),
    }
    if (zero := f"{module}.weight_zero_point") in entries:
        tensors["zero"] = Stored(zero, (-(-num_out // per_word), groups), ("I32",))
    if (order := f"{module}.weight_g_idx") in entries:
        tensors["group_of"] = Stored(order, (num_in,), ("I32", "I64"))

    def unpack(parts: Mapping[str, Tensor]) -> Kept:
        levels, scale = unpack_words(parts["packed"], bits, dim=1)[:, :num_in].contiguous(), parts["scale"]
        if "zero" in parts:
            zero = unpack_words(parts["zero"], bits, dim=0)[:num_out]
        else:
            zero = torch.full(scale.shape, 1 << bits - 1)
        return keep_levels(levels, zero, scale, bits, num_in // groups, parts.get("group_of"))

    return Source(tensors, unpack)


def _in_bytes(wanted: Wanted, entries: Entries) -> Source:
    name = f"{wanted.module}.weight_scale"
    (num_out, num_in), groups = wanted.shape, _num_groups(wanted, entries)
    shape = one_of([(num_out, groups), (), (1,), (1, 1), (num_out,)], name, entries)
    tensors = {"q": Stored(wanted.name, wanted.shape, ("I8",)), "scale": Stored(name, shape, FLOATS)}
    if (zero := f"{wanted.module}.weight_zero_point") in entries:
        tensors["zero"] = Stored(zero, shape, ("I8",))

    def unpack(parts: Mapping[str, Tensor]) -> Kept:
        scale = parts["scale"].reshape(-1, groups).expand(num_out, groups)
        zero = parts.get("zero", torch.zeros(shape)).reshape(-1, groups).expand(num_out, groups)
        return keep_levels(
            parts["q"].view(torch.uint8) ^ INT8_MIDDLE, zero.int() + INT8_MIDDLE, scale, 8, num_in // groups
        )

    return Source(tensors, unpack)


def _num_groups(wanted: Wanted, entries: Entries) -> int:
    """As many as weight_scale has columns, where that can be."""
    entry = entries.get(f"{wanted.module}.weight_scale")
    columns = entry.shape[1] if entry is not None and len(entry.shape) == 2 else 1
    return columns if 0 < columns <= wanted.shape[1] and wanted.shape[1] % columns == 0 else 1
