"""Llama and what is shaped like it (`LlamaForCausalLM`), as data."""

from engine.models.hf import Architecture, DecoderConfig
from engine.models.spec import Dense


class LlamaConfig(DecoderConfig, kw_only=True):
    """Llama has no field of its own."""

    def feed_forward(self) -> Dense:
        """One SwiGLU for every token."""
        return Dense(self.intermediate_size)


_LAYER = "model.layers.{layer}"

SHARED_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "mixer.norm": f"{_LAYER}.input_layernorm.weight",
    "attention.query": f"{_LAYER}.self_attn.q_proj.weight",
    "attention.key": f"{_LAYER}.self_attn.k_proj.weight",
    "attention.value": f"{_LAYER}.self_attn.v_proj.weight",
    "attention.output": f"{_LAYER}.self_attn.o_proj.weight",
    "attention.query_bias": f"{_LAYER}.self_attn.q_proj.bias",
    "attention.key_bias": f"{_LAYER}.self_attn.k_proj.bias",
    "attention.value_bias": f"{_LAYER}.self_attn.v_proj.bias",
    "attention.output_bias": f"{_LAYER}.self_attn.o_proj.bias",
    "feed_forward.norm": f"{_LAYER}.post_attention_layernorm.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
}

ARCHITECTURE = Architecture(
    config=LlamaConfig,
    names={
        **SHARED_NAMES,
        "feed_forward.gate": f"{_LAYER}.mlp.gate_proj.weight",
        "feed_forward.up": f"{_LAYER}.mlp.up_proj.weight",
        "feed_forward.down": f"{_LAYER}.mlp.down_proj.weight",
    },
)
