"""Which part of a model one of several ranks computes.

Owns the division (Megatron-LM, arXiv 1909.08053): of attention, whole heads with the columns of the output matrix that
read them; of a feed-forward, some of its inner features, or some of a mixture's experts whole; of the vocabulary, some
of its tokens. A rank's part is a model of the same kind with smaller numbers, computed by the same code, and the ranks'
results of a branch are summed. What the spec does not make smaller every rank has: norms, routers, latents, and
key-value heads where ranks outnumber them.
"""

from collections.abc import Iterator
from dataclasses import replace

from engine.errors import EngineMisconfigured
from engine.models.spec import Dense, FeedForward, GroupedQuery, Latent, LayerSpec, Mixer, Mixture, ModelSpec
from engine.ranks import RANKS_MAX, Ranks

Cut = tuple[range, ...]  # of each of a tensor's dimensions


def part_of(spec: ModelSpec, ranks: Ranks) -> ModelSpec:
    """What this rank computes of the model. Raises EngineMisconfigured where so many ranks cannot share it evenly."""
    if ranks.size == 1:
        return spec
    if obstacle := next(_obstacles(spec, ranks), None):
        fitting = [size for size in range(1, RANKS_MAX + 1) if not any(_obstacles(spec, replace(ranks, size=size)))]
        raise EngineMisconfigured(
            f"ranks is {ranks.size}, and {obstacle}; the model can have {', '.join(map(str, fitting))} ranks"
        )
    layers = [LayerSpec(_mixer(layer.mixer, ranks), _feed_forward(layer.feed_forward, ranks)) for layer in spec.layers]
    return replace(spec, vocab_size=-(-spec.vocab_size // ranks.size), layers=tuple(layers))


def cut(whole: tuple[int, ...], part: tuple[int, ...], ranks: Ranks) -> Cut:
    """Which of a tensor of the model this rank has, from the tensor's shape and that in the rank's spec.

    Where there are fewer parts than ranks, neighbours have the same one. The last of a vocabulary may be shorter.
    """
    starts = [-(-n // m) * ranks.rank // ranks.size * m for n, m in zip(whole, part, strict=True)]
    return tuple(range(start, min(start + m, n)) for start, n, m in zip(starts, whole, part, strict=True))


def _mixer(mixer: Mixer, ranks: Ranks) -> Mixer:
    match mixer:
        case GroupedQuery():
            return replace(
                mixer,
                num_heads=mixer.num_heads // ranks.size,
                num_kv_heads=max(1, mixer.num_kv_heads // ranks.size),
                output_bias=mixer.output_bias and ranks.rank == 0,  # results are summed: one of them has it
            )
        case Latent():
            return replace(mixer, num_heads=mixer.num_heads // ranks.size)


def _feed_forward(feed_forward: FeedForward, ranks: Ranks) -> FeedForward:
    intermediate = feed_forward.intermediate // ranks.size
    match feed_forward:
        case Dense():
            return replace(feed_forward, intermediate=intermediate)
        case Mixture(num_experts=num_experts):
            shared = feed_forward.shared_intermediate // ranks.size
            if ranks.whole_experts:
                first, behind = (num_experts * rank // ranks.size for rank in (ranks.rank, ranks.rank + 1))
                return replace(feed_forward, shared_intermediate=shared, held=range(first, behind))
            has_bias = feed_forward.expert_output_bias and ranks.rank == 0  # as above
            return replace(
                feed_forward, shared_intermediate=shared, intermediate=intermediate, expert_output_bias=has_bias
            )


def _obstacles(spec: ModelSpec, ranks: Ranks) -> Iterator[str]:
    """Why so many ranks cannot share the model."""
    size = ranks.size
    # With fewer tokens a last rank could be left without any.
    if spec.vocab_size < size**2:
        yield f"a vocabulary of {spec.vocab_size} tokens is too small for {size}"
    for index, layer in enumerate(spec.layers):
        mixer = layer.mixer
        if mixer.num_heads % size:
            yield f"layer {index} has {mixer.num_heads} heads, which do not divide by {size}"
        if isinstance(mixer, GroupedQuery) and mixer.num_kv_heads % size and size % mixer.num_kv_heads:
            yield f"layer {index} has {mixer.num_kv_heads} key-value heads, of which neither divides the other"
        yield from _obstacles_of_feed_forward(layer.feed_forward, ranks, index)


def _obstacles_of_feed_forward(feed_forward: FeedForward, ranks: Ranks, layer: int) -> Iterator[str]:
    size = ranks.size
    if isinstance(feed_forward, Mixture) and ranks.whole_experts:
        if feed_forward.num_experts < size:
            yield f"layer {layer} has {feed_forward.num_experts} experts, fewer than {size}"
    elif feed_forward.intermediate % size:
        yield f"layer {layer} has {feed_forward.intermediate} inner features, which do not divide by {size}"
    if isinstance(feed_forward, Mixture) and feed_forward.shared_intermediate % size:
        yield f"layer {layer} has a shared expert of {feed_forward.shared_intermediate}, which do not divide by {size}"
