"""The demo model (`SmolLM2MoeForCausalLM`, made by `engine/demo_model`), as data.

SmolLM2 is a Llama. Here its feed-forward is cut into a shared expert and routed ones, each chosen expert counted whole.
"""

from collections.abc import Sequence

from engine.models import names
from engine.models.hf import Architecture, DecoderConfig, Experts, Size
from engine.models.spec import Mixture


class SmolLM2MoeConfig(DecoderConfig, kw_only=True):
    """`intermediate_size` is that of one routed expert."""

    shared_intermediate_size: Size
    num_experts: Experts
    num_experts_per_tok: Experts

    def feed_forwards(self) -> Sequence[Mixture]:
        """Unit weights: with all experts chosen the model is the dense one."""
        mixture = Mixture(
            num_experts=self.num_experts,
            num_chosen=self.num_experts_per_tok,
            intermediate=self.intermediate_size,
            shared_intermediate=self.shared_intermediate_size,
            score="unit",
            renormalise=False,
            router_bias=True,
        )
        return [mixture] * self.num_hidden_layers


_MOE = f"{names.LAYER}.moe"

ARCHITECTURE = Architecture(
    config=SmolLM2MoeConfig,
    names={
        **names.BASE,
        **names.ATTENTION,
        "router": f"{_MOE}.router.weight",
        "router_bias": f"{_MOE}.router.bias",
        "shared.gate": f"{_MOE}.shared.gate_proj.weight",
        "shared.up": f"{_MOE}.shared.up_proj.weight",
        "shared.down": f"{_MOE}.shared.down_proj.weight",
        "expert.gate": f"{_MOE}.experts.{{expert}}.gate_proj.weight",
        "expert.up": f"{_MOE}.experts.{{expert}}.up_proj.weight",
        "expert.down": f"{_MOE}.experts.{{expert}}.down_proj.weight",
    },
)
