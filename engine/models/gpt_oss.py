"""GPT-OSS (`GptOssForCausalLM`, arXiv 2508.10925), as data."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from engine.models import names
from engine.models.hf import Architecture, DecoderConfig, Experts
from engine.models.hf_rope import Positive, require
from engine.models.names import Packed
from engine.models.spec import Clamp, GroupedQuery, Mixture


class GptOssConfig(DecoderConfig, kw_only=True):
    """GPT-OSS's own fields."""

    num_local_experts: Experts
    num_experts_per_tok: Experts
    rope_theta: Positive = 150_000.0
    attention_bias: bool = True
    swiglu_alpha: Positive = 1.702
    swiglu_limit: Positive = 7.0
    layer_types: list[Literal["sliding_attention", "full_attention"]] | None = None

    def feed_forwards(self) -> Sequence[Mixture]:
        """The same in every layer. A softmax over the chosen is one over all, made to sum to 1."""
        mixture = Mixture(
            num_experts=self.num_local_experts,
            num_chosen=self.num_experts_per_tok,
            intermediate=self.intermediate_size,
            router_bias=True,
            expert_bias=True,
            expert_output_bias=True,
            clamp=Clamp(self.swiglu_alpha, self.swiglu_limit),
        )
        return [mixture] * self.num_hidden_layers

    def windows(self) -> Sequence[int | None]:
        """In every other layer, beginning with the first, unless the file says otherwise."""
        kinds = self.layer_types or [
            "full_attention" if layer % 2 else "sliding_attention" for layer in range(self.num_hidden_layers)
        ]
        require(len(kinds) == self.num_hidden_layers, f"layer_types names {len(kinds)} layers")
        return [self.sliding_window or None if kind == "sliding_attention" else None for kind in kinds]

    def grouped_query(self) -> Sequence[GroupedQuery]:
        """With a sink for each head."""
        require(bool(self.rope_parameters or self.rope_scaling), "rope_parameters are missing")
        return [replace(mixer, sinks=True) for mixer in super().grouped_query()]


_EXPERTS = f"{names.LAYER}.mlp.experts"

ARCHITECTURE = Architecture(
    config=GptOssConfig,
    names={
        **names.BASE,
        **names.ATTENTION,
        "attention.sinks": f"{names.LAYER}.self_attn.sinks",
        "router": f"{names.LAYER}.mlp.router.weight",
        "router_bias": f"{names.LAYER}.mlp.router.bias",
        "expert.gate": Packed(f"{_EXPERTS}.gate_up_proj", start=0, step=2),
        "expert.up": Packed(f"{_EXPERTS}.gate_up_proj", start=1, step=2),
        "expert.down": Packed(f"{_EXPERTS}.down_proj"),
        "expert.gate_bias": Packed(f"{_EXPERTS}.gate_up_proj_bias", start=0, step=2),
        "expert.up_bias": Packed(f"{_EXPERTS}.gate_up_proj_bias", start=1, step=2),
        "expert.down_bias": Packed(f"{_EXPERTS}.down_proj_bias"),
    },
)
