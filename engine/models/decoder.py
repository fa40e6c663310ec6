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

from engine.models.draft_layer import DraftLayer
from engine.models.layer import Layer
from engine.models.layers import Embedding, StepInputs, Weights
from engine.models.parameters import Parameter
from engine.models.parts import part_of
from engine.models.rotary import inverse_frequencies
from engine.models.spec import GroupedQuery, Latent, Mixer, ModelSpec
from engine.quant import Kept
from kernels.cache import row_size
from kernels.ops import AttentionBatch


@dataclass(frozen=True)
class KVCache:
    """What is kept of all tokens in all blocks, for each layer: keys (N, B, G, D) and values (N, B, G, Dv).

    `kernels/cache.py` says how, in each of its dtypes. Of latent attention's one tensor the values are a part: the
    latents, and behind them the rotated keys. The states are those that the head reads, of a model that has a layer to
    draft by them: whoever finds a token's keys finds its state.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    states: Tensor | None = None  # (N, B, C), fp32 beside fp32, else bf16: what a norm made is not for 8 bits

    @classmethod
    def allocate(
        cls, spec: ModelSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: str | torch.device = "cpu"
    ) -> Self:
        """A cache of `num_blocks` blocks, all zero: `num_blocks * bytes_per_block` bytes.

        Raises ValueError where the dtype cannot keep what the model has: int8 has a scale for each key and each value,
        and latents are both.
        """
        keys, values = [], []
        for layer in spec.layers + spec.draft_layers:
            num_heads, size, num_tensors = _rows(layer.mixer, dtype)
            tensors = [
                torch.zeros(num_blocks, block_size, num_heads, size, dtype=dtype, device=device)
                for _ in range(num_tensors)
            ]
            keys.append(tensors[0])
            values.append(tensors[0][..., : layer.mixer.latent_size] if isinstance(layer.mixer, Latent) else tensors[1])
        states = None
        if spec.draft_layers:
            states = torch.zeros(num_blocks, block_size, spec.hidden_size, dtype=_state_dtype(dtype), device=device)
        return cls(tuple(keys), tuple(values), states)

    @staticmethod
    def bytes_per_block(spec: ModelSpec, block_size: int, dtype: torch.dtype) -> int:
        """What one block costs over all layers, keys and values together, and the states."""
        num_kept = sum(prod(_rows(layer.mixer, dtype)) for layer in spec.layers + spec.draft_layers)
        state_bytes = spec.hidden_size * _state_dtype(dtype).itemsize if spec.draft_layers else 0
        return block_size * (num_kept * dtype.itemsize + state_bytes)


def _state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float32 else torch.bfloat16


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
        self._head = weights.head(  # before the layers: what it takes while it is made is free for them
            Kept.plain(self._embedding.matrix) if spec.tied_embeddings else weights.tensors.take(Parameter("head"))
        )
        self._layers = [Layer(layer, spec.norm_eps, weights, index) for index, layer in enumerate(self.part.layers)]
        self._norm = weights.tensor(Parameter("norm"))  # (C,)
        self._draft_layer = DraftLayer(spec, weights) if spec.draft_layers else None
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
        """The logits (R, V) fp32 that follow the tokens at `rows` (R,). The cache holds all T tokens' keys, values and,
        where it keeps any, states.

        token_ids (T,) and positions (T,), int64, lie as `batch` says.
        """
        step = self._inputs(positions, batch, cache)
        residual = self._embedding(token_ids)  # (T, C)
        branch = torch.zeros_like(residual)  # what is to be added to the residual stream before the next norm
        for layer in self._layers:
            branch, residual = layer(branch, residual, step)
        if cache.states is None:
            branch, residual = branch[rows], residual[rows]
        states, _ = self._ops.add_rms_norm(branch, residual, self._norm, self.spec.norm_eps)
        if cache.states is not None:
            _write(cache.states, batch.slots, states)
            states = states[rows]
        return self._logits(states)

    def draft(
        self, token_ids: Tensor, positions: Tensor, batch: AttentionBatch, cache: KVCache, rows: Tensor
    ) -> Tensor:
        """The logits (R, V) fp32 of what follows the tokens at `rows`, by the layer for multi-token prediction.

        Each token is the one *behind* its place: at place i the layer has the state of token i, and token i + 1. So the
        cache's state must be there for all T. Those of the places behind `rows`, which are nobody's yet, become the
        layer's own, so that it can go on from its own draft; of a sequence at most the last token has a row.
        Raises ValueError where the model was loaded without the layer.
        """
        if self._draft_layer is None or cache.states is None:
            raise ValueError("the model has no layer for multi-token prediction, or was loaded without it")
        before = cache.states.flatten(0, 1)[batch.slots].to(self.dtype)  # (T, C)
        step = self._inputs(positions, batch, cache)
        states = self._draft_layer(self._embedding(token_ids), before, step)[rows]
        _write(cache.states, _slots_behind(batch, positions, rows, cache.states.shape[1]), states)
        return self._logits(states)

    def _inputs(self, positions: Tensor, batch: AttentionBatch, cache: KVCache) -> StepInputs:
        angles = positions[:, None].float() * self._inverse_frequencies  # (T, D/2)
        magnitude = self.spec.rope.magnitude
        return StepInputs(angles.cos() * magnitude, angles.sin() * magnitude, batch, cache.keys, cache.values)

    def _logits(self, states: Tensor) -> Tensor:
        """Of states (R, C), behind their norm: (R, V) fp32."""
        return self._ranks.gather(self._head(states), self.spec.vocab_size).float()


def _write(states: Tensor, slots: Tensor, new: Tensor) -> None:
    states.flatten(0, 1).index_copy_(0, slots, new.to(states.dtype))


def _slots_behind(batch: AttentionBatch, positions: Tensor, rows: Tensor, block_size: int) -> Tensor:
    """Where the tokens behind those at `rows` (R,) will stand: (R,)."""
    ends = torch.tensor(batch.query_starts[1:], device=rows.device)
    owners = torch.searchsorted(ends, rows, right=True)
    places = positions[rows] + 1
    return batch.block_tables[owners, places // block_size] * block_size + places % block_size
