"""Our random checkpoints as bf16 GGUF files, for llama.cpp's own llama-quantize to go on from.

    python -m benchmarks.cpu.gguf_file FOLDER FILE

(Its converter knows published tokenizers alone, and ours is none.) Runs in the peer's Python: numpy and gguf, no torch.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Read = Callable[[str], Array]

ATTENTION = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj"}


def main(source: str, target: str) -> None:
    """Writes the file."""
    folder = Path(source)
    config = json.loads((folder / "config.json").read_text())
    is_mixtral = config["model_type"] == "mixtral"
    writer = gguf.GGUFWriter(target, "llama" if is_mixtral else "qwen3moe")
    _write_shape(writer, config)
    _write_vocabulary(writer, config["vocab_size"])
    for name, tensor in _tensors(config, _reader(folder / "model.safetensors")):
        if tensor.ndim == 1 or "gate_inp" in name:
            writer.add_tensor(name, np.ascontiguousarray(tensor))
        else:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(tensor), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_shape(writer: Any, config: Mapping[str, Any]) -> None:
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config.get("num_local_experts") or config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)


def _write_vocabulary(writer: Any, size: int) -> None:
    """One that llama.cpp accepts: three special tokens, a token for each byte, and names for the rest."""
    kind = gguf.TokenType
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens + [f"t{i}" for i in range(len(tokens), size)])
    writer.add_token_scores([0.0] * size)
    kinds = [kind.UNKNOWN, kind.CONTROL, kind.CONTROL] + [kind.BYTE] * 256
    writer.add_token_types(kinds + [kind.NORMAL] * (size - len(kinds)))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)


def _tensors(config: Mapping[str, Any], read: Read) -> Iterator[tuple[str, Array]]:
    is_mixtral = config["model_type"] == "mixtral"
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    experts = range(config.get("num_local_experts") or config["num_experts"])
    block = "block_sparse_moe" if is_mixtral else "mlp"
    matrices = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
    yield "token_embd.weight", read("model.embed_tokens.weight")
    yield "output_norm.weight", read("model.norm.weight")
    yield "output.weight", read("lm_head.weight")
    for layer in range(config["num_hidden_layers"]):
        here, there = f"blk.{layer}.", f"model.layers.{layer}."
        yield f"{here}attn_norm.weight", read(f"{there}input_layernorm.weight")
        yield f"{here}ffn_norm.weight", read(f"{there}post_attention_layernorm.weight")
        for ours, theirs in ATTENTION.items():
            matrix = read(f"{there}self_attn.{theirs}.weight")
            yield f"{here}{ours}.weight", _interleaved(matrix, heads.get(ours, 0)) if is_mixtral else matrix
        if not is_mixtral:
            yield f"{here}attn_q_norm.weight", read(f"{there}self_attn.q_norm.weight")
            yield f"{here}attn_k_norm.weight", read(f"{there}self_attn.k_norm.weight")
        yield f"{here}ffn_gate_inp.weight", read(f"{there}{block}.gate.weight")
        for ours, theirs in zip(("gate", "up", "down"), matrices, strict=True):
            stacked = [read(f"{there}{block}.experts.{expert}.{theirs}.weight") for expert in experts]
            yield f"{here}ffn_{ours}_exps.weight", np.stack(stacked)


def _interleaved(matrix: Array, num_heads: int) -> Array:
    """The rows in the order that the architecture `llama` rotates them in: pairs side by side, not half by half."""
    if not num_heads:
        return matrix
    halves = matrix.reshape(num_heads, 2, -1, matrix.shape[1])
    return halves.swapaxes(1, 2).reshape(matrix.shape)


def _reader(path: Path) -> Read:
    """Tensors by name, fp32, of a safetensors file in bf16: numpy has no bf16 of its own."""
    raw = np.memmap(path, np.uint8, "r")
    start = 8 + int(raw[:8].view(np.uint64)[0])
    index = json.loads(bytes(raw[8:start]))

    def read(name: str) -> Array:
        first, last = index[name]["data_offsets"]
        bits = raw[start + first : start + last].view(np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(index[name]["shape"])

    return read


if __name__ == "__main__":
    main(*sys.argv[1:])
