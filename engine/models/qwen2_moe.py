"""Qwen2-MoE (`Qwen2MoeForCausalLM`, arXiv 2407.10671), as data."""

from collections.abc import Sequence
from dataclasses import replace

from engine.models import names
from engine.models.hf import Architecture, DecoderConfig, Experts, Layers, Size
from engine.models.hf_rope import require
from engine.models.spec import Dense, FeedForward, GroupedQuery, Mixture


class QwenMoeConfig(DecoderConfig, kw_only=True):
    """The fields that Qwen2-MoE and Qwen3-MoE share: `intermediate_size` is that of the layers without experts."""

    num_experts_per_tok: Experts
    moe_intermediate_size: Size
    norm_topk_prob: bool = False
    decoder_sparse_step: Layers = 1
    mlp_only_layers: list[int] | None = None
    use_sliding_window: bool = False

    def mixture(self) -> Mixture:
        """The feed-forward of a layer with experts."""
        raise NotImplementedError

    def feed_forwards(self) -> Sequence[FeedForward]:
        """Experts in every `decoder_sparse_step`-th layer but `mlp_only_layers`."""
        dense, mixture = Dense(self.intermediate_size), self.mixture()
        without = {*(self.mlp_only_layers or ())}
        without |= {layer for layer in range(self.num_hidden_layers) if (layer + 1) % self.decoder_sparse_step}
        return [dense if layer in without else mixture for layer in range(self.num_hidden_layers)]

    def windows(self) -> Sequence[None]:
        """None: no published model uses them."""
        require(not self.use_sliding_window, "use_sliding_window is not supported, only false")
        return [None] * self.num_hidden_layers


class Qwen2MoeConfig(QwenMoeConfig, kw_only=True):
    """Qwen2-MoE's own fields."""

    num_experts: Experts
    shared_expert_intermediate_size: Size
    qkv_bias: bool = True

    def mixture(self) -> Mixture:
        """Routed experts beside a shared one that has a gate of its own."""
        return Mixture(
            num_experts=self.num_experts,
            num_chosen=self.num_experts_per_tok,
            intermediate=self.moe_intermediate_size,
            shared_intermediate=self.shared_expert_intermediate_size,
            shared_gate=True,
            renormalise=self.norm_topk_prob,
        )

    def grouped_query(self) -> Sequence[GroupedQuery]:
        """Biases on query, key and value alone."""
        return [replace(mixer, bias=self.qkv_bias, output_bias=False) for mixer in super().grouped_query()]


_MLP = f"{names.LAYER}.mlp"

ARCHITECTURE = Architecture(
    config=Qwen2MoeConfig,
    names={
        **names.BASE,
        **names.ATTENTION,
        **names.DENSE,
        **names.ROUTED,
        "shared.gate": f"{_MLP}.shared_expert.gate_proj.weight",
        "shared.up": f"{_MLP}.shared_expert.up_proj.weight",
        "shared.down": f"{_MLP}.shared_expert.down_proj.weight",
        "shared_gate": f"{_MLP}.shared_expert_gate.weight",
    },
)
