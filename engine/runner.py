"""Executes a plan: batch, model, tokens.

Owns the way to the device and back, once a step. Never decides: what to compute is the plan's, what to keep the
scheduler's. There is no state between two steps but what the model keeps in its cache.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from engine import sampler
from engine.batch import Batch, build_batch
from engine.scheduler import Plan
from engine.sequence import Accepted
from kernels.ops import Ops


class Runner:
    """`forward` computes a batch: it writes each token's place in the cache, and returns logits (R, V) fp32."""

    def __init__(self, forward: Callable[[Batch], Tensor], ops: Ops, block_size: int, device: torch.device) -> None:
        self._forward = forward
        self._ops = ops
        self._block_size = block_size
        self._device = device

    @torch.inference_mode()
    def execute(self, plan: Plan) -> list[Accepted]:
        """All of the plan is computed; what each share brought, in the plan's order."""
        if not plan.shares:
            return []
        batch = build_batch(plan.shares, self._block_size, self._device)
        return sampler.accept(self._ops, self._forward(batch), plan.shares)
