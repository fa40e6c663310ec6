"""Dense feed-forward to mixture of experts, without training.

Owns the method, that of CMoE (arXiv 2502.04416): the neurons that are strong whatever the text become the shared
expert; the others fall into experts by what they are strong together for; a router learns by least squares which expert
will be strong. With all experts chosen the mixture is exactly the dense layer: each neuron is in one expert, which
weighs 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain

import torch
from torch import Tensor

from engine.models.decoder import Decoder, KVCache
from engine.models.layers import Weights
from engine.models.parameters import Parameter, Tensors
from engine.models.spec import Dense, Mixture, ModelSpec
from kernels.ops import AttentionBatch
from kernels.reference import OPS

# Chosen by perplexity on held-out prose and code: with 7 of 8 experts 14.3 where the dense model has 13.2; with 4, 24.
MIXTURE = Mixture(
    num_experts=8,
    num_chosen=7,
    intermediate=128,
    shared_intermediate=512,
    score="unit",
    renormalise=False,
    router_bias=True,
)
NUM_ROUNDS = 4  # of k-means; the experts hardly change after the third
RIDGE = 30.0  # keeps the least squares well posed: 2,000 tokens for 577 unknowns


@dataclass(frozen=True)
class Observation:
    """What one layer's feed-forward saw and did over the calibration text."""

    inputs: Tensor  # (T, C)
    activations: Tensor  # (T, I): silu(gate) * up of every neuron


@dataclass(frozen=True)
class Carving:
    """Which neurons (indices into I) make up which expert, and how to choose among the experts."""

    shared: Tensor  # (shared_intermediate,)
    experts: Tensor  # (E, intermediate)
    router: Tensor  # (E, C)
    router_bias: Tensor  # (E,)


def observe(
    spec: ModelSpec, tensors: Tensors, texts: Sequence[Sequence[int]], tell: Callable[[Observation], None]
) -> None:
    """The dense model has read the texts (token ids), and `tell` has heard of every layer's feed-forward, in order.

    The decoder is our own; two entries of its table of operations listen.
    """
    normed = torch.empty(0)

    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        nonlocal normed
        normed, total = OPS.add_rms_norm(x, residual, weight, eps)
        return normed, total

    def swiglu(gate_up: Tensor) -> Tensor:
        activations = OPS.swiglu(gate_up)
        tell(Observation(normed, activations))  # a feed-forward's input is the last thing that was normalised
        return activations

    listening = replace(OPS, add_rms_norm=add_rms_norm, swiglu=swiglu)
    _read(Decoder(spec, Weights(tensors, listening, "fp32", torch.float32, torch.device("cpu"))), texts)


def _read(decoder: Decoder, texts: Sequence[Sequence[int]]) -> None:
    """One step over all texts, each in a block of its own, without logits."""
    lengths = [len(text) for text in texts]
    blocks, block_size = torch.arange(len(texts)), max(lengths)
    positions = torch.cat([torch.arange(length) for length in lengths])  # (T,)
    batch = AttentionBatch(
        block_tables=blocks[:, None],
        query_starts=[0, *accumulate(lengths)],
        context_lens=lengths,
        slots=blocks.repeat_interleave(torch.tensor(lengths)) * block_size + positions,
    )
    cache = KVCache.allocate(decoder.spec, len(texts), block_size, torch.float32)
    decoder.forward(torch.tensor([*chain(*texts)]), positions, batch, cache, rows=torch.arange(0))


def carve(seen: Observation, down: Tensor, mixture: Mixture, seed: int) -> Carving:
    """One layer's experts, from what it did over all texts. `down` (C, I) tells how much each neuron's word counts."""
    strength = seen.activations.abs() * down.norm(dim=0)  # (T, I)
    by_energy = strength.square().mean(0).argsort(descending=True, stable=True)
    shared, routed = by_energy[: mixture.shared_intermediate], by_energy[mixture.shared_intermediate :]
    experts = routed[_clusters(strength[:, routed].T, mixture.num_experts, seed)]  # (E, intermediate)
    energy = torch.stack([strength[:, expert].norm(dim=1) for expert in experts], dim=1)  # (T, E)
    solution = _ridge(torch.cat([seen.inputs, torch.ones(len(seen.inputs), 1)], dim=1), energy)  # (C + 1, E)
    return Carving(shared, experts, router=solution[:-1].T.contiguous(), router_bias=solution[-1].contiguous())


def _clusters(neurons: Tensor, num_clusters: int, seed: int) -> Tensor:
    """The neurons (n, T) in clusters alike in direction, of equal size: indices (num_clusters, n / num_clusters)."""
    directions = torch.nn.functional.normalize(neurons, dim=1)
    start = torch.randperm(len(neurons), generator=torch.Generator().manual_seed(seed))[:num_clusters]
    centres = directions[start]  # (num_clusters, T)
    for _ in range(NUM_ROUNDS):
        members = _assign(directions @ centres.T)
        centres = torch.nn.functional.normalize(directions[members].mean(1), dim=1)
    return members


def _assign(similarity: Tensor) -> Tensor:
    """Each of n neurons to one of m clusters of equal room, similarity (n, m); the most certain choose first."""
    n, m = similarity.shape
    members: list[list[int]] = [[] for _ in range(m)]
    preferences = similarity.argsort(dim=1, descending=True, stable=True).tolist()
    for neuron in similarity.amax(1).argsort(descending=True, stable=True).tolist():
        chosen = next(cluster for cluster in preferences[neuron] if len(members[cluster]) < n // m)
        members[chosen].append(neuron)
    return torch.tensor(members)


def _ridge(x: Tensor, y: Tensor) -> Tensor:
    """The w that makes |x w - y|^2 + RIDGE |w|^2 least."""
    solution: Tensor = torch.linalg.solve(x.T @ x + RIDGE * torch.eye(x.shape[1]), x.T @ y)
    return solution


def carved_spec(dense: ModelSpec, mixture: Mixture) -> ModelSpec:
    """The spec of the carved model. Raises ValueError where the mixture's sizes do not sum to the dense layer's."""
    there = mixture.shared_intermediate + mixture.num_experts * mixture.intermediate
    for layer in dense.layers:
        if layer.feed_forward != Dense(there):
            raise ValueError(f"a mixture of {there} neurons cannot be carved from {layer.feed_forward}")
    return replace(dense, layers=tuple(replace(layer, feed_forward=mixture) for layer in dense.layers))


def carved_layer(tensors: Tensors, layer: int, carving: Carving) -> dict[Parameter, Tensor]:
    """The parameters of one layer's mixture: the dense ones, cut up."""
    gate, up, down = (
        tensors.take(Parameter(f"feed_forward.{role}", layer)).floats() for role in ("gate", "up", "down")
    )
    parts = {Parameter("router", layer): carving.router, Parameter("router_bias", layer): carving.router_bias}
    neurons_of = {("shared", None): carving.shared} | {
        ("expert", e): carving.experts[e] for e in range(len(carving.experts))
    }
    for (role, expert), neurons in neurons_of.items():
        parts[Parameter(f"{role}.gate", layer, expert)] = gate[neurons]
        parts[Parameter(f"{role}.up", layer, expert)] = up[neurons]
        parts[Parameter(f"{role}.down", layer, expert)] = down[:, neurons].contiguous()
    return parts
