"""The decoder: from a step's tokens to the logits of the rows that were asked for.

Owns the residual stream and the block cache's tensors. Which blocks belong to whom is `engine/blocks.py`'s affair, the
batch comes from `engine/batch.py`, and what the logits become is the sampler's.
"""

import copy
from dataclasses import dataclass
from math import prod
from typing import Self

import torch
from torch import Tensor

from engine.models.attention import GroupedQueryAttention
from engine.models.layers import Embedding, StepInputs, SwiGlu, Weights
from engine.models.mla import LatentAttention
from engine.models.moe import MixtureOfExperts
from engine.models.parameters import Parameter
from engine.models.parts import part_of
from engine.models.rotary import inverse_frequencies
from engine.models.spec import Dense, FeedForward, GroupedQuery, Latent, LayerSpec, Mixer, Mixture, ModelSpec
from engine.quant import Kept
from kernels.cache import row_size
from kernels.ops import AttentionBatch


@dataclass(frozen=True)
class KVCache:
    """What is kept of all tokens in all blocks, for each layer: keys (N, B, G, D) and values (N, B, G, Dv).

    `kernels/cache.py` says how, in each of its dtypes. Of latent attention's one tensor the values are a part: the
    latents, and behind them the rotated keys.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @classmethod
    def allocate(
        cls, spec: ModelSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: str | torch.device = "cpu"
    ) -> Self:
        """A cache of `num_blocks` blocks, all zero: `num_blocks * bytes_per_block` bytes.

        Raises ValueError where the dtype cannot keep what the model has: int8 has a scale for each key and each value,
        and latents are both.
        """
        keys, values = [], []
        for layer in spec.layers:
            num_heads, size, num_tensors = _rows(layer.mixer, dtype)
            tensors = [
                torch.zeros(num_blocks, block_size, num_heads, size, dtype=dtype, device=device)
                for _ in range(num_tensors)
            ]
            keys.append(tensors[0])
            values.append(tensors[0][..., : layer.mixer.latent_size] if isinstance(layer.mixer, Latent) else tensors[1])
        return cls(tuple(keys), tuple(values))

    @staticmethod
    def bytes_per_block(spec: ModelSpec, block_size: int, dtype: torch.dtype) -> int:
        """What one block costs over all layers, keys and values together."""
        return block_size * sum(prod(_rows(layer.mixer, dtype)) for layer in spec.layers) * dtype.itemsize


def _rows(mixer: Mixer, dtype: torch.dtype) -> tuple[int, int, int]:
    """What one token takes in a layer: heads, the elements of a row, and how many tensors of such there are."""
    match mixer:
        case GroupedQuery(num_kv_heads=num_heads, head_size=size):
            return num_heads, row_size(size, dtype), 2
        case Latent():
            if dtype == torch.int8:
                raise ValueError("a cache of int8 cannot keep the latents of DeepSeek's attention: take fp8 or bf16")
            return 1, mixer.num_cached, 1


class Decoder:
    """A model ready to compute, or one rank's part of it. It keeps no state between steps but its weights."""

    def __init__(self, spec: ModelSpec, weights: Weights) -> None:
        self.spec = spec
        self.part = part_of(spec, weights.ranks)  # what of it is computed here
        self.dtype = weights.dtype
        self.device = weights.device
        self._ops = weights.ops
        self._ranks = weights.ranks
        self._embedding = Embedding(weights, self.part.vocab_size)
        self._layers = [_Layer(layer, weights, index) for index, layer in enumerate(self.part.layers)]
        self._norm = weights.tensor(Parameter("norm"))  # (C,)
        self._head = weights.head(
            Kept.plain(self._embedding.matrix) if spec.tied_embeddings else weights.tensors.take(Parameter("head"))
        )
        rotary_size = spec.layers[0].mixer.rotary_size  # one table of angles serves all layers
        self._inverse_frequencies = inverse_frequencies(spec.rope, rotary_size).to(weights.device)  # (D/2,)

    def with_experts(self, num_chosen: int) -> "Decoder":
        """The same model and weights, with so many experts for each token at most: faster, and less right."""
        other = copy.copy(self)
        other._layers = [layer.with_experts(num_chosen) for layer in self._layers]
        return other

    def forward(
        self, token_ids: Tensor, positions: Tensor, batch: AttentionBatch, cache: KVCache, rows: Tensor
    ) -> Tensor:
        """The logits (R, V) fp32 that follow the tokens at `rows` (R,); the cache holds the keys and values of all T.

        token_ids (T,) and positions (T,), int64, lie as `batch` says.
        """
        angles = positions[:, None].float() * self._inverse_frequencies  # (T, D/2)
        magnitude = self.spec.rope.magnitude
        step = StepInputs(angles.cos() * magnitude, angles.sin() * magnitude, batch, cache.keys, cache.values)
        add_norm, eps, all_of = self._ops.add_rms_norm, self.spec.norm_eps, self._ranks.sum
        residual = self._embedding(token_ids)  # (T, C)
        branch = torch.zeros_like(residual)  # what is to be added to the residual stream before the next norm
        for layer in self._layers:
            normed, residual = add_norm(branch, residual, layer.mixer_norm, eps)
            normed, residual = add_norm(all_of(layer.mixer(normed, step)), residual, layer.feed_forward_norm, eps)
            branch = all_of(layer.feed_forward(normed))
        normed, _ = add_norm(branch[rows], residual[rows], self._norm, eps)
        return self._ranks.gather(self._head(normed), self.spec.vocab_size).float()


class _Layer:
    """One layer's branches and the norms before them."""

    def __init__(self, spec: LayerSpec, weights: Weights, index: int) -> None:
        self.mixer_norm = weights.tensor(Parameter("mixer.norm", index))
        self.mixer = _mixer(spec.mixer, weights, index)
        self.feed_forward_norm = weights.tensor(Parameter("feed_forward.norm", index))
        self.feed_forward = _feed_forward(spec.feed_forward, weights, index)

    def with_experts(self, num_chosen: int) -> "_Layer":
        other = copy.copy(self)
        if isinstance(self.feed_forward, MixtureOfExperts):
            other.feed_forward = self.feed_forward.with_experts(num_chosen)
        return other


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
