"""OLMoE (`OlmoeForCausalLM`, arXiv 2409.02060), as data."""

from collections.abc import Sequence
from dataclasses import replace

from engine.models import names
from engine.models.hf import Architecture, DecoderConfig, Experts
from engine.models.hf_rope import require
from engine.models.spec import GroupedQuery, Mixture, QueryKeyNorm


class OlmoeConfig(DecoderConfig, kw_only=True):
    """OLMoE's own fields."""

    num_experts: Experts
    num_experts_per_tok: Experts
    norm_topk_prob: bool = False
    clip_qkv: float | None = None

    def feed_forwards(self) -> Sequence[Mixture]:
        """The same in every layer."""
        mixture = Mixture(
            num_experts=self.num_experts,
            num_chosen=self.num_experts_per_tok,
            intermediate=self.intermediate_size,
            renormalise=self.norm_topk_prob,
        )
        return [mixture] * self.num_hidden_layers

    def grouped_query(self) -> Sequence[GroupedQuery]:
        """With a norm of all queries and one of all keys; the published model clips nothing."""
        require(self.clip_qkv is None, "clip_qkv is not supported, only null")
        norm = QueryKeyNorm(self.rms_norm_eps, per_head=False)
        return [replace(mixer, query_key_norm=norm) for mixer in super().grouped_query()]


ARCHITECTURE = Architecture(
    config=OlmoeConfig,
    names={**names.BASE, **names.ATTENTION, **names.QUERY_KEY_NORMS, **names.ROUTED},
)
