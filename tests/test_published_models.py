"""The published models' own configurations make models of their published sizes, without a byte of their weights."""

from dataclasses import replace
from math import prod
from typing import Any

import pytest

from engine.models import ARCHITECTURES
from engine.models.parameters import parameters

_LLAMA = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
_HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}
_MISTRAL = _LLAMA | _HEADS | {"vocab_size": 32000, "max_position_embeddings": 32768}
_QWEN3 = {
    "vocab_size": 151936,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}
_DEEPSEEK: dict[str, Any] = {
    "vocab_size": 102400,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
    },
}

# Architecture, what its config.json says, billions of parameters.
PUBLISHED: dict[str, tuple[str, dict[str, Any], float]] = {
    "Llama-3.1-8B": (
        "LlamaForCausalLM",
        _LLAMA
        | _HEADS
        | {
            "max_position_embeddings": 131072,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        8.03,
    ),
    "Mistral-7B-v0.1": ("MistralForCausalLM", _MISTRAL | {"sliding_window": 4096}, 7.24),
    "Mixtral-8x7B-v0.1": (
        "MixtralForCausalLM",
        _MISTRAL | {"num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1e6, "sliding_window": None},
        46.7,
    ),
    "Qwen3-8B": (
        "Qwen3ForCausalLM",
        _QWEN3
        | {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "use_sliding_window": False,
            "max_window_layers": 36,
        },
        8.19,
    ),
    "Qwen3-30B-A3B": (
        "Qwen3MoeForCausalLM",
        _QWEN3
        | {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
        30.5,
    ),
    "Qwen1.5-MoE-A2.7B": (
        "Qwen2MoeForCausalLM",
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-6,
            "sliding_window": 32768,
            "use_sliding_window": False,
        },
        14.3,
    ),
    "OLMoE-1B-7B-0924": (
        "OlmoeForCausalLM",
        {
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "clip_qkv": None,
        },
        6.92,
    ),
    "gpt-oss-20b": (
        "GptOssForCausalLM",
        {
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 24,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
            "attention_bias": True,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150000,
            "layer_types": ["sliding_attention", "full_attention"] * 12,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        },
        20.9,
    ),
    "DeepSeek-V2-Lite": (
        "DeepseekV2ForCausalLM",
        _DEEPSEEK
        | {
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "q_lora_rank": None,
            "n_routed_experts": 64,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
        },
        15.7,
    ),
    "DeepSeek-V2": (
        "DeepseekV2ForCausalLM",
        _DEEPSEEK
        | {
            "hidden_size": 5120,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "num_hidden_layers": 60,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "q_lora_rank": 1536,
            "n_routed_experts": 160,
            "topk_method": "group_limited_greedy",
            "n_group": 8,
            "topk_group": 3,
            "routed_scaling_factor": 16.0,
        },
        235.7,
    ),
    "DeepSeek-V3": (
        "DeepseekV3ForCausalLM",
        _DEEPSEEK
        | {
            "vocab_size": 129280,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "num_hidden_layers": 61,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "q_lora_rank": 1536,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "first_k_dense_replace": 3,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "norm_topk_prob": True,
            "n_group": 8,
            "topk_group": 4,
            "routed_scaling_factor": 2.5,
            "num_nextn_predict_layers": 1,
            "rope_scaling": _DEEPSEEK["rope_scaling"] | {"mscale": 1.0, "mscale_all_dim": 1.0},
        },
        671.0,
    ),
}


# What published index files call a layer's tensors: gpt-oss-20b's own, Llama-3.1-8B's, and of models of the same
# architectures Mixtral-8x22B's, Mistral-Small-24B's and Qwen3-0.6B's.
_ATTENTION = {"input_layernorm.weight", "post_attention_layernorm.weight"} | {
    f"self_attn.{matrix}_proj.weight" for matrix in "qkvo"
}
_DENSE = _ATTENTION | {f"mlp.{matrix}_proj.weight" for matrix in ("gate", "up", "down")}
LAYERS = {
    "Llama-3.1-8B": _DENSE,
    "Mistral-7B-v0.1": _DENSE,
    "Qwen3-8B": _DENSE | {"self_attn.q_norm.weight", "self_attn.k_norm.weight"},
    "Mixtral-8x7B-v0.1": _ATTENTION
    | {"block_sparse_moe.gate.weight"}
    | {f"block_sparse_moe.experts.{expert}.w{number}.weight" for expert in range(8) for number in (1, 2, 3)},
    "gpt-oss-20b": _ATTENTION
    | {f"self_attn.{matrix}_proj.bias" for matrix in "qkvo"}
    | {"self_attn.sinks", "mlp.router.weight", "mlp.router.bias"}
    | {
        f"mlp.experts.{matrix}_proj{kept}" for matrix in ("gate_up", "down") for kept in ("_bias", "_blocks", "_scales")
    },
}


@pytest.mark.parametrize("name", LAYERS)
def test_parameters_are_looked_for_by_the_names_of_published_index_files(name: str) -> None:
    architecture = ARCHITECTURES[PUBLISHED[name][0]]
    spec = architecture.spec_from_config(PUBLISHED[name][1])
    asked = {architecture.tensor_name(parameter) for parameter in parameters(spec)}
    ends = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    layers = {f"model.layers.{layer}.{tensor}" for layer in range(len(spec.layers)) for tensor in LAYERS[name]}
    assert asked == ends | {tensor.removesuffix("_blocks").removesuffix("_scales") for tensor in layers}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_makes_a_model_of_its_published_size(name: str) -> None:
    architecture, config, billions = PUBLISHED[name]
    spec = replace(ARCHITECTURES[architecture].spec_from_config(config), draft_layers=())
    assert sum(map(prod, parameters(spec).values())) / 1e9 == pytest.approx(billions, rel=0.004)


def test_the_layer_for_multi_token_prediction_has_its_published_size_and_names() -> None:
    """14 billion with the copies of the embedding and the head, says DeepSeek-V3's model card, which has the names."""
    architecture, config, _ = PUBLISHED["DeepSeek-V3"]
    spec = ARCHITECTURES[architecture].spec_from_config(config)
    own = {parameter: shape for parameter, shape in parameters(spec).items() if parameter.layer == 61}
    copies = 2 * spec.vocab_size * spec.hidden_size
    assert (sum(map(prod, own.values())) + copies) / 1e9 == pytest.approx(13.5, abs=0.5)
    names = {
        ARCHITECTURES[architecture].tensor_name(parameter) for parameter in own if parameter.role.startswith("draft")
    }
    assert names == {f"model.layers.61.{name}.weight" for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm")}


def test_the_cache_of_latents_is_small() -> None:
    """A token of V2-Lite takes 30.4 KiB in bf16; with the keys and values of its 16 heads it would take 270."""
    architecture, config, _ = PUBLISHED["DeepSeek-V2-Lite"]
    layers = ARCHITECTURES[architecture].spec_from_config(config).layers
    assert sum(2 * layer.mixer.num_cached for layer in layers) == 27 * (512 + 64) * 2
