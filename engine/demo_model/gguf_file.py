"""SmolLM2 as its GGUF file has it: a Llama, its tokenizer and its chat template.

Owns the difference between llama.cpp's layout and Hugging Face's. The file is trusted: its hash has been verified.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.errors import ModelError
from engine.models.parameters import Parameter
from engine.models.spec import Dense, GroupedQuery, LayerSpec, ModelSpec, Rope
from engine.quant import Kept

_NAMES = {
    "embedding": "token_embd.weight",
    "mixer.norm": "blk.{layer}.attn_norm.weight",
    "attention.query": "blk.{layer}.attn_q.weight",
    "attention.key": "blk.{layer}.attn_k.weight",
    "attention.value": "blk.{layer}.attn_v.weight",
    "attention.output": "blk.{layer}.attn_output.weight",
    "feed_forward.norm": "blk.{layer}.ffn_norm.weight",
    "feed_forward.gate": "blk.{layer}.ffn_gate.weight",
    "feed_forward.up": "blk.{layer}.ffn_up.weight",
    "feed_forward.down": "blk.{layer}.ffn_down.weight",
    "norm": "output_norm.weight",
}
_INTERLEAVED = {"attention.query", "attention.key"}


class GgufFile:
    """The file's tensors under our names, in fp32 and Llama's layout: a decoder's `Tensors`."""

    def __init__(self, path: Path) -> None:
        gguf = _gguf()
        reader = gguf.GGUFReader(path)
        self._dequantize = gguf.dequantize
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._fields = reader.fields
        self.mixer = self._mixer()
        self.spec = self._spec()

    def take(self, parameter: Parameter) -> Kept:
        """The tensor in fp32. It may be taken more than once."""
        stored = self._tensors[_NAMES[parameter.role].format(layer=parameter.layer)]
        tensor = torch.from_numpy(self._dequantize(stored.data, stored.tensor_type).astype(np.float32))
        if parameter.role in _INTERLEAVED:
            tensor = halves_from_pairs(tensor, self.mixer.head_size)
        return Kept.plain(tensor)

    def field(self, name: str) -> Any:
        """A value of the file's header."""
        return self._fields[name].contents()

    def _mixer(self) -> GroupedQuery:
        H, C = self.field("llama.attention.head_count"), self.field("llama.embedding_length")
        return GroupedQuery(num_heads=H, num_kv_heads=self.field("llama.attention.head_count_kv"), head_size=C // H)

    def _spec(self) -> ModelSpec:
        layer = LayerSpec(self.mixer, Dense(self.field("llama.feed_forward_length")))
        return ModelSpec(
            vocab_size=self.field("llama.vocab_size"),
            hidden_size=self.field("llama.embedding_length"),
            layers=(layer,) * self.field("llama.block_count"),
            norm_eps=self.field("llama.attention.layer_norm_rms_epsilon"),
            rope=Rope(self.field("llama.rope.freq_base")),
            tied_embeddings=True,
            context_max=self.field("llama.context_length"),
            eos_token_ids=(self.field("tokenizer.ggml.eos_token_id"),),
        )


def halves_from_pairs(matrix: Tensor, head_size: int) -> Tensor:
    """The rows of a query or key matrix (out, in) as Llama's rotary embedding wants them.

    llama.cpp turns the rows (2 i, 2 i + 1) of a head together and so stores them as neighbours; Llama turns
    (i, i + D/2).
    """
    heads = matrix.view(-1, head_size // 2, 2, matrix.shape[1])  # (heads, D/2, 2, in)
    return heads.transpose(1, 2).reshape(matrix.shape)


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ModelError("the demo model needs the package gguf: install tokenmill[demo]") from error
    return gguf
