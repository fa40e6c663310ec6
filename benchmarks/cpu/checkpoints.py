"""The checkpoints that all contenders load: random weights, made once, and what other engines need made of them.

Their text is noise and their speed is that of a trained model of the same shape. Owns the folder they lie in; `make`
and `quantize_rows` do nothing where the files are there.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.cpu.loads import VOCAB_SIZE
from worker.folders import models_folder

HOME = models_folder().parent / "peers"  # of checkpoints and of the engines that load them, unless told otherwise
SEED = 1234
SHAPE: Mapping[str, object] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES: Mapping[str, tuple[str, Mapping[str, object]]] = {  # class in transformers, and what is its own
    "mixtral-0.5b": ("Mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen3-moe-64e": (
        "Qwen3Moe",
        {
            "moe_intermediate_size": 256,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    ),
}


def make(home: Path, name: str) -> Path:
    """The checkpoint's folder: bf16 weights as transformers draws them, a tokenizer for tools that insist on one."""
    folder = home / name
    if (folder / "tokenizer.json").exists():
        return folder
    import transformers

    kind, own = SHAPES[name]
    torch.manual_seed(SEED)
    config = getattr(transformers, f"{kind}Config")(**SHAPE, **own, dtype="bfloat16")
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    _make_tokenizer(folder)
    return folder


def _make_tokenizer(folder: Path) -> None:
    import tokenizers
    import transformers

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"t{i}": i for i in range(3, VOCAB_SIZE)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def quantize_rows(source: Path) -> Path:
    """The checkpoint in compressed-tensors' W8A8: int8 rows with a scale each, activations scaled at run time."""
    folder = source.with_name(f"{source.name}-w8a8")
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(exist_ok=True)
    for path in source.glob("*token*.json"):
        shutil.copy(path, folder)
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        tensors |= _quantized(name, tensor) if _is_quantized(name, tensor) else {name: tensor}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    block = "block_sparse_moe" if config["model_type"] == "mixtral" else "mlp"
    routers = [f"model.layers.{layer}.{block}.gate" for layer in range(config["num_hidden_layers"])]
    config["quantization_config"] = _compressed_tensors(["lm_head", *routers])
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def _is_quantized(name: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and not any(kept in name for kept in ("embed_tokens", "lm_head", ".gate.weight"))


def _quantized(name: str, weight: Tensor) -> dict[str, Tensor]:
    scale = (weight.float().abs().amax(1, keepdim=True) / 127).clamp(min=1e-8)
    codes = (weight.float() / scale).round().clamp(-127, 127).to(torch.int8)
    return {name: codes, name.replace(".weight", ".weight_scale"): scale.bfloat16()}


def _compressed_tensors(kept: list[str]) -> Mapping[str, object]:
    integers = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": integers | {"strategy": "channel", "dynamic": False},
        "input_activations": integers | {"strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": kept,
        "config_groups": {"group_0": group},
    }
