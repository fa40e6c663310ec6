"""The models: architectures as data, and the one decoder that computes them all.

Owns `ARCHITECTURES`, by the name that a checkpoint's `config.json` gives itself. To add one of a known kind: a data
file here and a line below.
"""

from collections.abc import Mapping

from engine.models import (
    deepseek_v2,
    deepseek_v3,
    gpt_oss,
    llama,
    mistral,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    smollm2_moe,
)
from engine.models.decoder import Decoder, KVCache
from engine.models.hf import Architecture
from engine.models.spec import ModelSpec

ARCHITECTURES: Mapping[str, Architecture] = {
    "DeepseekV2ForCausalLM": deepseek_v2.ARCHITECTURE,
    "DeepseekV3ForCausalLM": deepseek_v3.ARCHITECTURE,
    "GptOssForCausalLM": gpt_oss.ARCHITECTURE,
    "LlamaForCausalLM": llama.ARCHITECTURE,
    "MistralForCausalLM": mistral.ARCHITECTURE,
    "MixtralForCausalLM": mixtral.ARCHITECTURE,
    "OlmoeForCausalLM": olmoe.ARCHITECTURE,
    "Qwen2MoeForCausalLM": qwen2_moe.ARCHITECTURE,
    "Qwen3ForCausalLM": qwen3.ARCHITECTURE,
    "Qwen3MoeForCausalLM": qwen3_moe.ARCHITECTURE,
    "SmolLM2MoeForCausalLM": smollm2_moe.ARCHITECTURE,
}

__all__ = ["ARCHITECTURES", "Architecture", "Decoder", "KVCache", "ModelSpec"]
