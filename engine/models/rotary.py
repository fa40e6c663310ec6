"""The angles of the rotary embedding: how fast each pair turns, however the context was stretched."""

import math

import torch
from torch import Tensor

from engine.models.spec import LinearScaling, Llama3Scaling, Rope, YarnScaling


def inverse_frequencies(rope: Rope, size: int) -> Tensor:
    """(size / 2,) fp32: by how much each pair turns from one position to the next."""
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
    frequencies = 1.0 / rope.theta**exponents
    match rope.scaling:
        case None:
            return frequencies
        case LinearScaling(factor):
            return frequencies / factor
        case Llama3Scaling():
            return _llama3(frequencies, rope.scaling)
        case YarnScaling():
            return _yarn(frequencies, rope.scaling, rope.theta)


def _llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    turns = scaling.original_context * frequencies / (2 * math.pi)  # within the context that the model was trained on
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)  # 0: slow, wholly scaled; 1: fast, kept
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _yarn(frequencies: Tensor, scaling: YarnScaling, theta: float) -> Tensor:
    size = 2 * len(frequencies)

    def pair(turns: float) -> float:
        """The pair, as a fraction, that makes so many turns within the original context."""
        return size * math.log(scaling.original_context / (2 * math.pi * turns)) / (2 * math.log(theta))

    first, last = pair(scaling.fast_turns), pair(scaling.slow_turns)
    if scaling.whole_pairs:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    span = last - first or 0.001  # transformers' own guard against a step of no width
    scaled = ((torch.arange(len(frequencies)) - first) / span).clamp(0, 1)  # 0: fast, kept; 1: slow, wholly scaled
    return frequencies * (1 - scaled + scaled / scaling.factor)
