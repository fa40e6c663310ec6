"""GPTQ (arXiv 2210.17323) as AutoGPTQ and GPTQModel write it.

A quantized layer has, in place of its weight,

    qweight  (in * bits / 32, out) int32    a word holds neighbours along `in`, the lowest bits first
    qzeros   (groups, out * bits / 32) int32  neighbours along `out`; of format "gptq" one less than the zero point
    scales   (groups, out)
    g_idx    (in,) int32                    each input's group: with desc_act they are not neighbours

and weight = (level - zero) * scale.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from msgspec import Struct
from torch import Tensor

from engine.models.hf_rope import require
from engine.quant import Kept
from engine.schemes.integers import WORD_BITS, keep_levels, unpack_words
from engine.schemes.scheme import FLOATS, Entries, Source, Stored, Wanted


class GptqConfig(Struct, forbid_unknown_fields=True, kw_only=True):
    """`quantization_config`. What is `Any` says how the weights were found, or which kernels others take."""

    quant_method: Literal["gptq"]
    bits: int
    group_size: int
    desc_act: bool = False
    sym: bool = True
    checkpoint_format: Literal["gptq", "gptq_v2"] | None = "gptq"
    pack_dtype: Literal["int32"] = "int32"
    dynamic: None = None  # other bits for some layers
    rotation: None = None
    lm_head: bool = False
    act_group_aware: Any = None
    adapter: None = None
    backend: Any = None
    batch_size: Any = None
    block_name_to_quantize: Any = None
    cache_block_outputs: Any = None
    damp_percent: Any = None
    dataset: Any = None
    disable_exllama: Any = None
    exllama_config: Any = None
    is_marlin_format: Literal[False] = False
    max_input_length: Any = None
    meta: Any = None
    model_file_base_name: Any = None
    model_name_or_path: Any = None
    model_seqlen: Any = None
    module_name_preceding_first_block: Any = None
    modules_in_block_to_quantize: Any = None
    pad_token_id: Any = None
    quantizer: Any = None
    static_groups: Any = None
    tokenizer: Any = None
    true_sequential: Any = None
    use_cuda_fp16: Any = None
    use_exllama: Any = None

    def scheme(self) -> "Gptq":
        """How such a checkpoint is stored. Raises ModelError for what we do not read."""
        require(self.bits in (4, 8), f"quantization_config.bits {self.bits} is not supported, only 4 and 8")
        require(self.group_size == -1 or self.group_size > 0, f"quantization_config.group_size {self.group_size}")
        return Gptq(self.bits, self.group_size, zero_offset=0 if self.checkpoint_format == "gptq_v2" else 1)


@dataclass(frozen=True)
class Gptq:
    """The scheme."""

    bits: int
    group_size: int  # -1: all of a row
    zero_offset: int
    ignored: tuple[str, ...] = ()
    ignored_zeros: tuple[str, ...] = (".bias",)  # AutoGPTQ of 2023 wrote one for every layer

    def source(self, wanted: Wanted, entries: Entries) -> Source | None:
        """Of what has a `qweight`."""
        module = wanted.module
        if not wanted.is_matrix or f"{module}.qweight" not in entries:
            return None
        num_out, num_in = wanted.shape
        per_word = WORD_BITS // self.bits
        group = num_in if self.group_size == -1 else self.group_size
        groups = -(-num_in // group)
        tensors = {
            "qweight": Stored(f"{module}.qweight", (-(-num_in // per_word), num_out), ("I32",)),
            "qzeros": Stored(f"{module}.qzeros", (groups, -(-num_out // per_word)), ("I32",)),
            "scales": Stored(f"{module}.scales", (groups, num_out), FLOATS),
        }
        if f"{module}.g_idx" in entries:
            tensors["g_idx"] = Stored(f"{module}.g_idx", (num_in,), ("I32",))

        def unpack(parts: Mapping[str, Tensor]) -> Kept:
            levels = unpack_words(parts["qweight"], self.bits, dim=0)[:num_in].t().contiguous()
            zero = unpack_words(parts["qzeros"], self.bits, dim=1)[:, :num_out].t().int() + self.zero_offset
            return keep_levels(levels, zero, parts["scales"].t().contiguous(), self.bits, group, parts.get("g_idx"))

        return Source(tensors, unpack)
