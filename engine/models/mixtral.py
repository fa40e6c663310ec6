"""Mixtral (`MixtralForCausalLM`, arXiv 2401.04088), as data."""

from engine.models.hf import Architecture, DecoderConfig, Experts
from engine.models.llama import SHARED_NAMES
from engine.models.spec import Mixture


class MixtralConfig(DecoderConfig, kw_only=True):
    """Mixtral's own fields."""

    num_local_experts: Experts
    num_experts_per_tok: Experts

    def feed_forward(self) -> Mixture:
        """Softmax over all experts, the chosen ones' weights made to sum to 1."""
        return Mixture(
            num_experts=self.num_local_experts,
            num_chosen=self.num_experts_per_tok,
            intermediate=self.intermediate_size,
        )


_MOE = "model.layers.{layer}.block_sparse_moe"

ARCHITECTURE = Architecture(
    config=MixtralConfig,
    names={
        **SHARED_NAMES,
        "router": f"{_MOE}.gate.weight",
        "expert.gate": f"{_MOE}.experts.{{expert}}.w1.weight",
        "expert.up": f"{_MOE}.experts.{{expert}}.w3.weight",
        "expert.down": f"{_MOE}.experts.{{expert}}.w2.weight",
    },
)
