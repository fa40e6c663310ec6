"""The layer for multi-token prediction (DeepSeek-V3, arXiv 2412.19437, 2.2): one layer that drafts for the model.

Owns how a token and the state before it become the layer's input. The state is the model's own behind its last norm, or
for a second draft the layer's own behind its norm, as transformers has them too. Embedding and head are the model's.
"""

import torch
from torch import Tensor

from engine.models.layer import Layer
from engine.models.layers import StepInputs, Weights
from engine.models.parameters import Parameter
from engine.models.spec import ModelSpec


class DraftLayer:
    """The first of a model's draft layers."""

    def __init__(self, spec: ModelSpec, weights: Weights) -> None:
        index = len(spec.layers)
        self._eps = spec.norm_eps
        self._ops = weights.ops
        self._token_norm = weights.tensor(Parameter("draft.token_norm", index))  # (C,)
        self._state_norm = weights.tensor(Parameter("draft.state_norm", index))  # (C,)
        self._merge = weights.projection(Parameter("draft.merge", index))
        self._layer = Layer(spec.draft_layers[0], self._eps, weights, index)
        self._norm = weights.tensor(Parameter("draft.norm", index))  # (C,)

    def __call__(self, embedded: Tensor, states: Tensor, step: StepInputs) -> Tensor:
        """The states (T, C) that the head reads, of tokens (T, C) and the states (T, C) before them."""
        tokens = self._ops.rms_norm(embedded, self._token_norm, self._eps)
        merged = self._merge(torch.cat([tokens, self._ops.rms_norm(states, self._state_norm, self._eps)], dim=-1))
        branch, residual = self._layer(torch.zeros_like(merged), merged, step)
        normed: Tensor = self._ops.add_rms_norm(branch, residual, self._norm, self._eps)[0]
        return normed
