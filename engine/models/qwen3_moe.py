"""Qwen3-MoE (`Qwen3MoeForCausalLM`, arXiv 2505.09388), as data: Qwen3's attention and Qwen2-MoE's layers."""

from collections.abc import Sequence
from dataclasses import replace

from engine.errors import ModelError
from engine.models import names
from engine.models.hf import Architecture, Experts
from engine.models.qwen2_moe import QwenMoeConfig
from engine.models.spec import GroupedQuery, Mixture, QueryKeyNorm


class Qwen3MoeConfig(QwenMoeConfig, kw_only=True):
    """Qwen3-MoE's own fields. The published files count `num_experts`, those of transformers 5 `num_local_experts`."""

    num_experts: Experts | None = None
    num_local_experts: Experts | None = None

    def mixture(self) -> Mixture:
        """Softmax over all experts; the chosen ones' weights sum to 1 where `norm_topk_prob` says so."""
        num_experts = self.num_experts or self.num_local_experts
        if num_experts is None:
            raise ModelError("config.json: neither num_experts nor num_local_experts is there")
        return Mixture(
            num_experts=num_experts,
            num_chosen=self.num_experts_per_tok,
            intermediate=self.moe_intermediate_size,
            renormalise=self.norm_topk_prob,
        )

    def grouped_query(self) -> Sequence[GroupedQuery]:
        """With a norm of each query and key head."""
        norm = QueryKeyNorm(self.rms_norm_eps)
        return [replace(mixer, query_key_norm=norm) for mixer in super().grouped_query()]


ARCHITECTURE = Architecture(
    config=Qwen3MoeConfig,
    names={**names.BASE, **names.ATTENTION, **names.QUERY_KEY_NORMS, **names.DENSE, **names.ROUTED},
)
