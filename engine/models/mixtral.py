"""Mixtral (`MixtralForCausalLM`, arXiv 2401.04088), as data."""

from collections.abc import Sequence

from engine.models import names
from engine.models.hf import Architecture, DecoderConfig, Experts
from engine.models.spec import Mixture


class MixtralConfig(DecoderConfig, kw_only=True):
    """Mixtral's own fields."""

    num_local_experts: Experts
    num_experts_per_tok: Experts

    def feed_forwards(self) -> Sequence[Mixture]:
        """Softmax over all experts, the chosen ones' weights made to sum to 1."""
        mixture = Mixture(
            num_experts=self.num_local_experts,
            num_chosen=self.num_experts_per_tok,
            intermediate=self.intermediate_size,
        )
        return [mixture] * self.num_hidden_layers

    def windows(self) -> Sequence[int | None]:
        """The same in every layer; the published models have none."""
        return [self.sliding_window or None] * self.num_hidden_layers


_MOE = f"{names.LAYER}.block_sparse_moe"

ARCHITECTURE = Architecture(
    config=MixtralConfig,
    names={
        **names.BASE,
        **names.ATTENTION,
        "router": f"{_MOE}.gate.weight",
        "expert.gate": f"{_MOE}.experts.{{expert}}.w1.weight",
        "expert.up": f"{_MOE}.experts.{{expert}}.w3.weight",
        "expert.down": f"{_MOE}.experts.{{expert}}.w2.weight",
    },
)
