"""Tiny random Mixtral and Llama checkpoints, made on the spot by transformers, and transformers' own opinion of them.

Owns the shapes of the parity suite. The text means nothing; the arithmetic must agree.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

# The default of 0.02 leaves the logits of such small models all but equal, so that greedy choices hang on rounding.
# 0.15 spreads them by about 1.
INITIALIZER_RANGE = 0.15

VOCAB_SIZE = 97  # a prime: nothing divides it by chance

# The plainest of transformers' ways to compute: its grouped matrix product refuses odd sizes.
_PLAIN: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager", "experts_implementation": "eager"}

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": INITIALIZER_RANGE,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
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


def transformers_logits(path: Path, tokens: list[int]) -> Tensor:
    """Transformers' logits (T, V) fp32 after each of the tokens."""
    with torch.inference_mode():
        logits: Tensor = _model(path)(torch.tensor([tokens]), use_cache=False).logits[0]
    return logits


def transformers_greedy(path: Path, prompt: list[int], num_tokens: int) -> list[int]:
    """The `num_tokens` tokens with which transformers goes on, greedily; no token ends it."""
    model, tokens = _model(path), list(prompt)
    with torch.inference_mode():
        for _ in range(num_tokens):
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def _save(path: Path, seed: int, model_class: Any, config: Any) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config).float()
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms start as ones and biases as zeros, which would hide that one is left out
                parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(path)
    return path


def _model(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, **_PLAIN).eval()
