"""DeepSeek-V3, R1 and V3.1 (`DeepseekV3ForCausalLM`, arXiv 2412.19437), as data."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

from msgspec import Meta

from engine.models import names
from engine.models.deepseek_v2 import NAMES, DeepseekConfig
from engine.models.hf import Architecture
from engine.models.hf_rope import require
from engine.models.spec import Latent, LayerSpec, Mixture


class DeepseekV3Config(DeepseekConfig, kw_only=True):
    """DeepSeek-V3's own fields."""

    scoring_func: Literal["sigmoid"] = "sigmoid"
    topk_method: Literal["noaux_tc"] = "noaux_tc"
    norm_topk_prob: bool = True
    rope_interleave: bool = True
    num_nextn_predict_layers: Annotated[int, Meta(ge=0, le=16)] = 0  # all that are published have one

    def mixture(self) -> Mixture:
        """Experts are chosen with a bias that balances their load, and weighted without it."""
        return replace(super().mixture(), score="sigmoid", renormalise=self.norm_topk_prob, balancing_bias=True)

    def mixers(self) -> Sequence[Latent]:
        """V2's."""
        require(self.rope_interleave, "rope_interleave is not supported, only true")
        return super().mixers()

    def draft_layers(self) -> tuple[LayerSpec, ...]:
        """Layers like the last."""
        return (LayerSpec(self.mixers()[-1], self.mixture()),) * self.num_nextn_predict_layers


ARCHITECTURE = Architecture(
    config=DeepseekV3Config,
    names={
        **NAMES,
        **names.DRAFT,
        "router_balance": f"{names.LAYER}.mlp.gate.e_score_correction_bias",
    },
)
