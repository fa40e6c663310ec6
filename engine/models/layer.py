"""One layer: two branches on the residual stream, each behind a norm.

Owns the order of norms, branches and sums. What a branch computes is its own module's affair.
"""

import copy

from torch import Tensor

from engine.models.attention import GroupedQueryAttention
from engine.models.layers import StepInputs, SwiGlu, Weights
from engine.models.mla import LatentAttention
from engine.models.moe import MixtureOfExperts
from engine.models.parameters import Parameter
from engine.models.spec import Dense, FeedForward, GroupedQuery, Latent, LayerSpec, Mixer, Mixture


class Layer:
    """The layer of this number, ready to compute."""

    def __init__(self, spec: LayerSpec, eps: float, weights: Weights, index: int) -> None:
        """`eps`: of its norms."""
        self._eps = eps
        self._add_norm = weights.ops.add_rms_norm
        self._all_of = weights.ranks.sum
        self.mixer = _mixer(spec.mixer, weights, index)
        self.mixer_norm = weights.norm(Parameter("mixer.norm", index), self.mixer.layouts)
        self.feed_forward = _feed_forward(spec.feed_forward, weights, index)
        self.feed_forward_norm = weights.norm(Parameter("feed_forward.norm", index), self.feed_forward.layouts)

    def with_experts(self, num_chosen: int) -> "Layer":
        """The same weights, with so many experts for each token at most where there are any."""
        other = copy.copy(self)
        if isinstance(self.feed_forward, MixtureOfExperts):
            other.feed_forward = self.feed_forward.with_experts(num_chosen)
        return other

    def __call__(self, branch: Tensor, residual: Tensor, step: StepInputs) -> tuple[Tensor, Tensor]:
        """From what is still to be added to the residual stream, and the stream, both (T, C), to the same behind it."""
        normed, residual = self._add_norm(branch, residual, self.mixer_norm, self._eps)
        mixed = self._all_of(self.mixer(normed, step))
        normed, residual = self._add_norm(mixed, residual, self.feed_forward_norm, self._eps)
        return self._all_of(self.feed_forward(normed)), residual


def _mixer(spec: Mixer, weights: Weights, layer: int) -> GroupedQueryAttention | LatentAttention:
    match spec:
        case GroupedQuery():
            return GroupedQueryAttention(spec, weights, layer)
        case Latent():
            return LatentAttention(spec, weights, layer)


def _feed_forward(spec: FeedForward, weights: Weights, layer: int) -> SwiGlu | MixtureOfExperts:
    match spec:
        case Dense():
            return SwiGlu(weights, layer)
        case Mixture():
            return MixtureOfExperts(spec, weights, layer)
