"""What checkpoints call our parameters, in the groups that most architectures share.

Owns names by role, with {layer} and {expert} to be filled in. An architecture's file puts together what it has.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """One tensor for a layer's experts: (E, in, step * out) for matrices (out, in), (E, step * out) for vectors (out,).

    A parameter is every `step`-th of its expert's outputs, from `start` on.
    """

    name: str
    start: int = 0
    step: int = 1

    def shape(self, parameter: tuple[int, ...], num_experts: int) -> tuple[int, ...]:
        """That of the tensor, from the parameter's."""
        out, *rest = parameter
        return (num_experts, *rest, out * self.step)

    def part(self, of_expert: Tensor) -> Tensor:
        """The parameter in the expert's share of the tensor, a view."""
        return of_expert.t()[self.start :: self.step]


LAYER = "model.layers.{layer}"

BASE = {
    "embedding": "model.embed_tokens.weight",
    "mixer.norm": f"{LAYER}.input_layernorm.weight",
    "feed_forward.norm": f"{LAYER}.post_attention_layernorm.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
}

ATTENTION = {
    "attention.query": f"{LAYER}.self_attn.q_proj.weight",
    "attention.key": f"{LAYER}.self_attn.k_proj.weight",
    "attention.value": f"{LAYER}.self_attn.v_proj.weight",
    "attention.output": f"{LAYER}.self_attn.o_proj.weight",
    "attention.query_bias": f"{LAYER}.self_attn.q_proj.bias",
    "attention.key_bias": f"{LAYER}.self_attn.k_proj.bias",
    "attention.value_bias": f"{LAYER}.self_attn.v_proj.bias",
    "attention.output_bias": f"{LAYER}.self_attn.o_proj.bias",
}

QUERY_KEY_NORMS = {
    "attention.query_norm": f"{LAYER}.self_attn.q_norm.weight",
    "attention.key_norm": f"{LAYER}.self_attn.k_norm.weight",
}

DENSE = {
    "feed_forward.gate": f"{LAYER}.mlp.gate_proj.weight",
    "feed_forward.up": f"{LAYER}.mlp.up_proj.weight",
    "feed_forward.down": f"{LAYER}.mlp.down_proj.weight",
}

# Of a layer for multi-token prediction, beside what every layer has. Of the embedding and the head it has copies.
DRAFT = {
    "draft.token_norm": f"{LAYER}.enorm.weight",
    "draft.state_norm": f"{LAYER}.hnorm.weight",
    "draft.merge": f"{LAYER}.eh_proj.weight",
    "draft.norm": f"{LAYER}.shared_head.norm.weight",
    "draft.embedding": f"{LAYER}.embed_tokens.weight",
    "draft.head": f"{LAYER}.shared_head.head.weight",
}

ROUTED = {
    "router": f"{LAYER}.mlp.gate.weight",
    "expert.gate": f"{LAYER}.mlp.experts.{{expert}}.gate_proj.weight",
    "expert.up": f"{LAYER}.mlp.experts.{{expert}}.up_proj.weight",
    "expert.down": f"{LAYER}.mlp.experts.{{expert}}.down_proj.weight",
}
