"""The inventory of a model: which tensors it is made of, and their shapes.

Owns the names by which the engine speaks of parameters. What a checkpoint calls them is its architecture's `names`;
where the tensors come from is the affair of whoever fills in `Tensors`.
"""

from typing import NamedTuple, Protocol

from engine.models.spec import Dense, FeedForward, GroupedQuery, Latent, Mixer, ModelSpec
from engine.quant import Kept


class Parameter(NamedTuple):
    """One tensor of a model. A matrix is (out, in); gate, up and down are a feed-forward's."""

    role: str  # "embedding", "attention.query", "expert.gate", ...
    layer: int | None = None
    expert: int | None = None


Shapes = dict[Parameter, tuple[int, ...]]

# Matrices that no weight format changes: looked up by rows, small and sensitive, or taken apart (engine/models/mla.py).
DENSE_ROLES = frozenset({"embedding", "router", "shared_gate", "latent.up"})


class Tensors(Protocol):
    """Where a decoder takes its parameters from, each once."""

    def take(self, parameter: Parameter) -> Kept:
        """The tensor as it is kept; what it stands for has the shape that `parameters` says."""
        ...


def parameters(spec: ModelSpec) -> Shapes:
    """Every parameter of the model with its shape, in the order of the forward pass."""
    shapes: Shapes = {Parameter("embedding"): (spec.vocab_size, spec.hidden_size)}
    for index, layer in enumerate(spec.layers + spec.draft_layers):
        shapes |= _draft(spec.hidden_size, index) if index >= len(spec.layers) else {}
        shapes[Parameter("mixer.norm", index)] = (spec.hidden_size,)
        shapes |= _mixer(layer.mixer, spec.hidden_size, index)
        shapes[Parameter("feed_forward.norm", index)] = (spec.hidden_size,)
        shapes |= _feed_forward(layer.feed_forward, spec.hidden_size, index)
    shapes[Parameter("norm")] = (spec.hidden_size,)
    if not spec.tied_embeddings:
        shapes[Parameter("head")] = (spec.vocab_size, spec.hidden_size)
    return shapes


def has_format(parameter: Parameter, shape: tuple[int, ...]) -> bool:
    """Whether the parameter is a matrix that is kept in the weight format; the head in that format's `head`."""
    return len(shape) == 2 and parameter.role not in DENSE_ROLES


def _draft(hidden: int, layer: int) -> Shapes:
    """What a layer for multi-token prediction has beside what every layer has."""
    norms: Shapes = {Parameter(f"draft.{role}", layer): (hidden,) for role in ("token_norm", "state_norm", "norm")}
    return norms | {Parameter("draft.merge", layer): (hidden, 2 * hidden)}


def _mixer(mixer: Mixer, hidden: int, layer: int) -> Shapes:
    match mixer:
        case GroupedQuery():
            return _grouped_query(mixer, hidden, layer)
        case Latent():
            return _latent(mixer, hidden, layer)


def _latent(mixer: Latent, hidden: int, layer: int) -> Shapes:
    H, R = mixer.num_heads, mixer.latent_size
    queries = H * (mixer.plain_size + mixer.rotary_size)
    shapes: dict[str, tuple[int, ...]] = {"latent.query": (queries, hidden)}
    if query_latent := mixer.query_latent_size:
        shapes = {
            "latent.query_down": (query_latent, hidden),
            "latent.query_norm": (query_latent,),
            "latent.query_up": (queries, query_latent),
        }
    shapes |= {
        "latent.down": (R + mixer.rotary_size, hidden),
        "latent.norm": (R,),
        "latent.up": (H * (mixer.plain_size + mixer.value_size), R),
        "attention.output": (hidden, H * mixer.value_size),
    }
    return {Parameter(role, layer): shape for role, shape in shapes.items()}


def _grouped_query(mixer: GroupedQuery, hidden: int, layer: int) -> Shapes:
    queries, keys = mixer.num_heads * mixer.head_size, mixer.num_kv_heads * mixer.head_size
    outs = {"attention.query": queries, "attention.key": keys, "attention.value": keys}
    shapes: Shapes = {Parameter(role, layer): (out, hidden) for role, out in outs.items()}
    if mixer.bias:
        shapes |= {Parameter(f"{role}_bias", layer): (out,) for role, out in outs.items()}
    if mixer.query_key_norm:
        per_head = mixer.query_key_norm.per_head
        sizes = {"query": mixer.head_size, "key": mixer.head_size} if per_head else {"query": queries, "key": keys}
        shapes |= {Parameter(f"attention.{role}_norm", layer): (size,) for role, size in sizes.items()}
    if mixer.sinks:
        shapes[Parameter("attention.sinks", layer)] = (mixer.num_heads,)
    shapes[Parameter("attention.output", layer)] = (hidden, queries)
    if mixer.output_bias:
        shapes[Parameter("attention.output_bias", layer)] = (hidden,)
    return shapes


def _feed_forward(feed_forward: FeedForward, hidden: int, layer: int) -> Shapes:
    if isinstance(feed_forward, Dense):
        return _swiglu("feed_forward", hidden, feed_forward.intermediate, layer)
    shapes: Shapes = {Parameter("router", layer): (feed_forward.num_experts, hidden)}
    if feed_forward.router_bias:
        shapes[Parameter("router_bias", layer)] = (feed_forward.num_experts,)
    if feed_forward.balancing_bias:
        shapes[Parameter("router_balance", layer)] = (feed_forward.num_experts,)
    if feed_forward.shared_intermediate:
        shapes |= _swiglu("shared", hidden, feed_forward.shared_intermediate, layer)
    if feed_forward.shared_gate:
        shapes[Parameter("shared_gate", layer)] = (1, hidden)
    for expert in feed_forward.experts:
        matrices = _swiglu("expert", hidden, feed_forward.intermediate, layer, expert)
        *inner, output = ((p._replace(role=f"{p.role}_bias"), (out,)) for p, (out, _) in matrices.items())
        shapes |= matrices
        shapes |= dict(inner) if feed_forward.expert_bias else {}
        shapes |= dict([output]) if feed_forward.expert_output_bias else {}
    return shapes


def _swiglu(role: str, hidden: int, intermediate: int, layer: int, expert: int | None = None) -> Shapes:
    return {
        Parameter(f"{role}.gate", layer, expert): (intermediate, hidden),
        Parameter(f"{role}.up", layer, expert): (intermediate, hidden),
        Parameter(f"{role}.down", layer, expert): (hidden, intermediate),
    }
