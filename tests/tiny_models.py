"""Tiny random checkpoints, made on the spot by transformers, and transformers' own opinion of them.

Owns the shapes of the parity suite. The text means nothing; the arithmetic must agree.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny_tokenizer import save_byte_level

# The default of 0.02 leaves the logits of such small models all but equal, so that greedy choices hang on rounding.
# 0.15 spreads them by about 1.
INITIALIZER_RANGE = 0.15

VOCAB_SIZE = 97  # a prime: nothing divides it by chance

# The plainest of transformers' ways to compute: its grouped matrix product refuses odd sizes.
_PLAIN: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager", "experts_implementation": "eager"}

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,  # this and all that matrices read, multiples of 32: int4 has groups of so many
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": INITIALIZER_RANGE,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}


YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "beta_fast": 8.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 64,  # with heads of 16: two pairs kept, one or two between, the rest scaled
}


def tiny_llama(tmp: Path, seed: int = 0, **shape: Any) -> Path:
    """A folder with a random fp32 Llama checkpoint; `shape` overrides fields of transformers' LlamaConfig."""
    config = transformers.LlamaConfig(**_SHAPE | shape)
    return _save(tmp / f"llama-{seed}", seed, transformers.LlamaForCausalLM, config)


def tiny_mixtral(tmp: Path, seed: int = 0, **shape: Any) -> Path:
    """A folder with a random fp32 Mixtral checkpoint; `shape` overrides fields of transformers' MixtralConfig."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    config = transformers.MixtralConfig(**_SHAPE | experts | shape)
    return _save(tmp / f"mixtral-{seed}", seed, transformers.MixtralForCausalLM, config)


def tiny_served(tmp: Path) -> Path:
    """A random Mixtral with a tokenizer and a chat template: a model folder like any other, but for sense."""
    path = tiny_mixtral(tmp, vocab_size=400, max_position_embeddings=1024)  # as many as the tokenizer has
    return save_byte_level(path)


def tiny_mistral(tmp: Path, seed: int = 0, **shape: Any) -> Path:
    """A folder with a random fp32 Mistral checkpoint, with windows of 9 tokens unless `shape` says otherwise."""
    config = transformers.MistralConfig(**_SHAPE | {"sliding_window": 9} | shape)
    return _save(tmp / f"mistral-{seed}", seed, transformers.MistralForCausalLM, config)


def tiny_qwen3(tmp: Path, seed: int = 0, **shape: Any) -> Path:
    """A folder with a random fp32 Qwen3 checkpoint; `shape` overrides fields of transformers' Qwen3Config."""
    config = transformers.Qwen3Config(**_SHAPE | {"head_dim": 16} | shape)
    return _save(tmp / f"qwen3-{seed}", seed, transformers.Qwen3ForCausalLM, config)


def tiny_qwen2_moe(tmp: Path, seed: int = 0, **shape: Any) -> Path:
    """A folder with a random fp32 Qwen2-MoE checkpoint; `shape` overrides fields of transformers' Qwen2MoeConfig."""
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = transformers.Qwen2MoeConfig(**_SHAPE | experts | {"shared_expert_intermediate_size": 64} | shape)
    return _save(tmp / f"qwen2_moe-{seed}", seed, transformers.Qwen2MoeForCausalLM, config)


def tiny_qwen3_moe(tmp: Path, seed: int = 0, **shape: Any) -> Path:
    """A folder with a random fp32 Qwen3-MoE checkpoint; `shape` overrides fields of transformers' Qwen3MoeConfig."""
    experts = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "norm_topk_prob": True}
    config = transformers.Qwen3MoeConfig(**_SHAPE | experts | {"head_dim": 16} | shape)
    return _save(tmp / f"qwen3_moe-{seed}", seed, transformers.Qwen3MoeForCausalLM, config)


def tiny_olmoe(tmp: Path, seed: int = 0, **shape: Any) -> Path:
    """A folder with a random fp32 OLMoE checkpoint; `shape` overrides fields of transformers' OlmoeConfig."""
    experts = {"num_experts": 8, "num_experts_per_tok": 3, "num_key_value_heads": 4}
    config = transformers.OlmoeConfig(**_SHAPE | experts | shape)
    return _save(tmp / f"olmoe-{seed}", seed, transformers.OlmoeForCausalLM, config)


def tiny_gpt_oss(tmp: Path, seed: int = 0, **shape: Any) -> Path:
    """A folder with a random fp32 GPT-OSS checkpoint; `shape` overrides fields of transformers' GptOssConfig."""
    experts = {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 9, "head_dim": 16}
    rope = {"rope_parameters": YARN_ROPE | {"truncate": False}}
    config = transformers.GptOssConfig(**_SHAPE | experts | rope | shape)
    return _save(tmp / f"gpt_oss-{seed}", seed, transformers.GptOssForCausalLM, config)


def tiny_deepseek_v2(tmp: Path, seed: int = 0, **shape: Any) -> Path:
    """A folder with a random fp32 DeepSeek-V2 checkpoint; `shape` overrides fields of its DeepseekV2Config."""
    experts = {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 2}
    latent = {"kv_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 24}
    lite = {"q_lora_rank": None, "first_k_dense_replace": 1, "num_key_value_heads": 4}
    config = transformers.DeepseekV2Config(**_SHAPE | experts | latent | lite | shape)
    return _save(tmp / f"deepseek_v2-{seed}", seed, transformers.DeepseekV2ForCausalLM, config)


def tiny_deepseek_v3(tmp: Path, seed: int = 0, **shape: Any) -> Path:
    """A folder with a random fp32 DeepSeek-V3 checkpoint; `shape` overrides fields of its DeepseekV3Config."""
    experts = {"n_routed_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "n_shared_experts": 1}
    groups = {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "num_key_value_heads": 4}
    latent = {"kv_lora_rank": 24, "q_lora_rank": 32, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 24}
    rope = {"rope_parameters": YARN_ROPE | {"mscale": 1.0, "mscale_all_dim": 1.0}}
    config = transformers.DeepseekV3Config(**_SHAPE | experts | groups | latent | rope | shape)
    return _save(tmp / f"deepseek_v3-{seed}", seed, transformers.DeepseekV3ForCausalLM, config)


_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # with heads of 16: one pair kept, two between, five scaled
}

Shape = tuple[Callable[..., Path], dict[str, Any]]
SHAPES: dict[str, Shape] = {
    "llama": (tiny_llama, {}),
    "llama, one key-value head, tied": (tiny_llama, {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama, heads wider than the hidden size": (
        tiny_llama,
        {"hidden_size": 42, "num_attention_heads": 6, "head_dim": 32},
    ),
    "llama, every head its own, biases": (tiny_llama, {"num_key_value_heads": 4, "attention_bias": True}),
    "llama, llama3 rope": (tiny_llama, {"head_dim": 16, "rope_parameters": _LLAMA3_ROPE}),
    "llama, linear rope": (tiny_llama, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama, yarn rope": (tiny_llama, {"head_dim": 16, "rope_parameters": YARN_ROPE}),
    "mixtral": (tiny_mixtral, {}),
    "mixtral, 8 experts, 3 chosen, tied": (
        tiny_mixtral,
        {"num_local_experts": 8, "num_experts_per_tok": 3, "tie_word_embeddings": True, "num_hidden_layers": 3},
    ),
    "mixtral, one chosen, odd hidden size": (
        tiny_mixtral,
        {
            "num_experts_per_tok": 1,
            "hidden_size": 37,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 8,
        },
    ),
    "mixtral, windows": (tiny_mixtral, {"sliding_window": 5}),
    "mistral": (tiny_mistral, {}),
    "mistral, windows of two tokens": (tiny_mistral, {"sliding_window": 2, "head_dim": 32}),
    "mistral, no windows": (tiny_mistral, {"sliding_window": None}),
    "qwen3": (tiny_qwen3, {}),
    "qwen2-moe": (tiny_qwen2_moe, {}),
    "qwen2-moe, dense layers between, no biases": (
        tiny_qwen2_moe,
        {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3], "qkv_bias": False},
    ),
    "qwen2-moe, weights that sum to 1": (tiny_qwen2_moe, {"norm_topk_prob": True, "num_experts_per_tok": 4}),
    "qwen3-moe": (tiny_qwen3_moe, {}),
    "qwen3-moe, weights as they are, a dense layer": (
        tiny_qwen3_moe,
        {"norm_topk_prob": False, "num_hidden_layers": 3, "mlp_only_layers": [0], "head_dim": 24},
    ),
    "olmoe": (tiny_olmoe, {}),
    "olmoe, shared keys, weights that sum to 1": (tiny_olmoe, {"num_key_value_heads": 2, "norm_topk_prob": True}),
    "gpt-oss": (tiny_gpt_oss, {}),
    "gpt-oss, every layer windowed, clamped hard": (
        tiny_gpt_oss,
        {
            "swiglu_limit": 0.5,
            "swiglu_alpha": 3.0,
            "sliding_window": 5,
            "layer_types": ["sliding_attention"] * 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 3,
        },
    ),
    "deepseek-v2": (
        tiny_deepseek_v2,
        {
            "q_lora_rank": 32,
            "n_routed_experts": 12,
            "num_experts_per_tok": 3,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
            "rope_parameters": YARN_ROPE | {"mscale": 0.7, "mscale_all_dim": 1.0},
        },
    ),
    "deepseek-v2, as lite": (
        tiny_deepseek_v2,
        {"rope_parameters": YARN_ROPE | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    ),
    "deepseek-v2, experts from the first layer on": (
        tiny_deepseek_v2,
        {"first_k_dense_replace": 0, "qk_rope_head_dim": 16, "num_attention_heads": 8, "num_key_value_heads": 8},
    ),
    "deepseek-v3": (tiny_deepseek_v3, {}),
    "deepseek-v3, one group, no latent queries, weights as they are": (
        tiny_deepseek_v3,
        {
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": None,
            "norm_topk_prob": False,
            "first_k_dense_replace": 0,
            "routed_scaling_factor": 1.5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    ),
    "qwen3, biases, tied": (tiny_qwen3, {"attention_bias": True, "tie_word_embeddings": True, "head_dim": 24}),
}


def with_draft_layer(path: Path, seed: int = 0) -> Path:
    """The folder, whose checkpoint now has DeepSeek-V3's layer for multi-token prediction, random like the others.

    It has every tensor of the last layer, and those that the published files have beside them (arXiv 2412.19437, 2.2).
    """
    tensors = load_file(path / "model.safetensors")
    last = max(int(name.split(".")[2]) for name in tensors if name.startswith("model.layers."))
    dice, hidden = torch.Generator().manual_seed(seed), tensors["model.norm.weight"].shape[0]

    def like(tensor: Tensor) -> Tensor:
        spread, mean = (0.2, 1.0) if tensor.dim() == 1 else (INITIALIZER_RANGE, 0.0)
        return mean + spread * torch.randn(tensor.shape, generator=dice)

    source, prefix = f"model.layers.{last}.", f"model.layers.{last + 1}."
    new = {prefix + name.removeprefix(source): like(one) for name, one in tensors.items() if name.startswith(source)}
    new |= {f"{prefix}{name}.weight": like(torch.empty(hidden)) for name in ("enorm", "hnorm", "shared_head.norm")}
    new[f"{prefix}eh_proj.weight"] = like(torch.empty(hidden, 2 * hidden))
    new[f"{prefix}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    new[f"{prefix}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors | new, path / "model.safetensors", metadata={"format": "pt"})
    return path


def tiny(name: str, tmp: Path, seed: int = 0) -> Path:
    """A folder with a random fp32 checkpoint of the shape SHAPES[name]."""
    make, shape = SHAPES[name]
    return make(tmp, seed, **shape)


def transformers_logits(path: Path, tokens: list[int]) -> Tensor:
    """Transformers' logits (T, V) fp32 after each of the tokens."""
    with torch.inference_mode():
        logits: Tensor = transformers_model(path)(torch.tensor([tokens]), use_cache=False).logits[0]
    return logits


def transformers_greedy(path: Path, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """The `num_tokens` tokens with which transformers goes on from each prompt, greedily; no token ends it.

    All prompts go through the model at once, from their first token at every step: a causal model does not see the
    padding behind a row's end, so there is no mask and no cache to be wrong.
    """
    model, ends = transformers_model(path), torch.tensor([len(prompt) for prompt in prompts])
    tokens = torch.zeros(len(prompts), int(ends.max()) + num_tokens, dtype=torch.int64)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    rows = torch.arange(len(prompts))
    with torch.inference_mode():
        for step in range(num_tokens):
            logits = model(tokens[:, : int(ends.max()) + step], use_cache=False).logits  # (prompts, length, V)
            tokens[rows, ends + step] = logits[rows, ends + step - 1].argmax(-1)
    return [row[end : end + num_tokens].tolist() for row, end in zip(tokens, ends.tolist(), strict=True)]


def transformers_model(path: Path) -> Any:
    """The folder's model as transformers has it, to compute with in its plainest way."""
    return transformers.AutoModelForCausalLM.from_pretrained(path, **_PLAIN).eval()


def _save(path: Path, seed: int, model_class: Any, config: Any) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config).float()
        for name, parameter in model.named_parameters():
            # Norms start as ones and biases as zeros, which would hide that one is left out.
            if parameter.dim() == 1 or name.endswith("_bias"):
                parameter.data += 0.2 * torch.randn_like(parameter)
        for name, buffer in model.named_buffers():
            if name.endswith("_bias"):  # DeepSeek-V3's, by which experts are chosen
                buffer.add_(0.2 * torch.randn_like(buffer))
    model.save_pretrained(path)
    return path
