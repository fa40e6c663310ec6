"""DeepSeek-V2 and V2-Lite (`DeepseekV2ForCausalLM`, arXiv 2405.04434), as data."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

from msgspec import Meta

from engine.models import names
from engine.models.hf import Architecture, DecoderConfig, Experts, Size
from engine.models.hf_rope import Positive, RopeConfig, require
from engine.models.spec import Dense, FeedForward, Latent, Mixture

# The norms inside the attention have the default of the class, whatever rms_norm_eps says; in the authors' code too.
LATENT_NORM_EPS = 1e-6


class DeepseekConfig(DecoderConfig, kw_only=True):
    """The fields that V2 and V3 share: `intermediate_size` is that of the first layers, which have no experts."""

    kv_lora_rank: Size
    q_lora_rank: Size | None = None
    qk_nope_head_dim: Size
    qk_rope_head_dim: Size
    v_head_dim: Size
    n_routed_experts: Experts
    n_shared_experts: Experts
    num_experts_per_tok: Experts
    moe_intermediate_size: Size
    first_k_dense_replace: Annotated[int, Meta(ge=0)] = 0
    moe_layer_freq: int = 1
    routed_scaling_factor: Positive = 1.0
    n_group: Experts | None = None
    topk_group: Experts | None = None

    def mixture(self) -> Mixture:
        """Routed experts beside shared ones, which are one expert of their joint size."""
        num_groups, groups_chosen = self.groups()
        return Mixture(
            num_experts=self.n_routed_experts,
            num_chosen=self.num_experts_per_tok,
            intermediate=self.moe_intermediate_size,
            shared_intermediate=self.n_shared_experts * self.moe_intermediate_size,
            scale=self.routed_scaling_factor,
            num_groups=num_groups,
            groups_chosen=groups_chosen,
        )

    def feed_forwards(self) -> Sequence[FeedForward]:
        """Dense layers, then mixtures."""
        require(self.moe_layer_freq == 1, f"moe_layer_freq {self.moe_layer_freq} is not supported, only 1")
        num_dense = min(self.first_k_dense_replace, self.num_hidden_layers)
        return [Dense(self.intermediate_size)] * num_dense + [self.mixture()] * (self.num_hidden_layers - num_dense)

    def mixers(self) -> Sequence[Latent]:
        """The same in every layer."""
        H, rotary = self.num_attention_heads, self.qk_rope_head_dim
        require(self.num_key_value_heads in (None, H), "num_key_value_heads is not num_attention_heads")
        require(not self.attention_bias, "attention_bias is not supported, only false")
        require(rotary % 2 == 0, f"qk_rope_head_dim {rotary} is not even: rotary embedding turns pairs")
        sharpening = (self.rope_parameters or self.rope_scaling or RopeConfig()).sharpening()
        mixer = Latent(
            num_heads=H,
            latent_size=self.kv_lora_rank,
            query_latent_size=self.q_lora_rank,
            plain_size=self.qk_nope_head_dim,
            rotary_size=rotary,
            value_size=self.v_head_dim,
            scale=sharpening**2 * (self.qk_nope_head_dim + rotary) ** -0.5,
            norm_eps=LATENT_NORM_EPS,
        )
        return [mixer] * self.num_hidden_layers

    def groups(self) -> tuple[int, int]:
        """How many groups of experts there are, and how many of them a token may choose from."""
        groups, chosen = self.n_group or 1, self.topk_group or 1
        require(self.n_routed_experts % groups == 0, f"n_routed_experts is not a multiple of n_group {groups}")
        require(chosen <= groups, f"topk_group {chosen} is more than n_group {groups}")
        eligible = chosen * (self.n_routed_experts // groups)
        require(self.num_experts_per_tok <= eligible, f"num_experts_per_tok is more than the {eligible} of topk_group")
        return groups, chosen


class DeepseekV2Config(DeepseekConfig, kw_only=True):
    """DeepSeek-V2's own fields."""

    scoring_func: Literal["softmax"] = "softmax"
    topk_method: Literal["greedy", "group_limited_greedy"] = "greedy"
    norm_topk_prob: bool = False

    def mixture(self) -> Mixture:
        """Weights as the softmax has them."""
        require(not self.norm_topk_prob, "norm_topk_prob is not supported, only false")
        return replace(super().mixture(), renormalise=False)

    def groups(self) -> tuple[int, int]:
        """One, unless the method says otherwise."""
        return (1, 1) if self.topk_method == "greedy" else super().groups()


_ATTENTION, _MLP = f"{names.LAYER}.self_attn", f"{names.LAYER}.mlp"

NAMES = {
    **names.BASE,
    **names.DENSE,
    **names.ROUTED,
    "attention.output": names.ATTENTION["attention.output"],
    "latent.query": f"{_ATTENTION}.q_proj.weight",
    "latent.query_down": f"{_ATTENTION}.q_a_proj.weight",
    "latent.query_norm": f"{_ATTENTION}.q_a_layernorm.weight",
    "latent.query_up": f"{_ATTENTION}.q_b_proj.weight",
    "latent.down": f"{_ATTENTION}.kv_a_proj_with_mqa.weight",
    "latent.norm": f"{_ATTENTION}.kv_a_layernorm.weight",
    "latent.up": f"{_ATTENTION}.kv_b_proj.weight",
    "shared.gate": f"{_MLP}.shared_experts.gate_proj.weight",
    "shared.up": f"{_MLP}.shared_experts.up_proj.weight",
    "shared.down": f"{_MLP}.shared_experts.down_proj.weight",
}

ARCHITECTURE = Architecture(config=DeepseekV2Config, names=NAMES)
