"""Executes a plan: batch, model, tokens.

Owns the way to the device and back, once a step: `launch` gives the device all that it needs, `collect` waits for what
it brought. Never decides: what to compute is the plan's, what to keep the scheduler's. All that stays between two steps
is what the model keeps in its cache, and the tokens of the newest step.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine import sampler
from engine.batch import Batch, build_batch, none_drawn
from engine.sampler import Drawn
from engine.scheduler import Plan
from engine.sequence import Accepted, Share
from kernels.ops import Ops


@dataclass(frozen=True)
class Pending:
    """A step that was launched."""

    plan: Plan
    _drawn: Drawn | None  # None: the plan is empty

    def collect(self) -> list[Accepted]:
        """What each share brought, in the plan's order; waits until the device has computed the step."""
        return self._drawn.accepted() if self._drawn else []


class Runner:
    """`forward` computes a batch: it writes each token's place in the cache, and returns logits (R, V) fp32."""

    def __init__(
        self,
        forward: Callable[[Batch], Tensor],
        ops: Ops,
        block_size: int,
        device: torch.device,
        pad: Callable[[list[Share]], list[Share]] = list,
    ) -> None:
        """`pad`: the plan's shares, and behind them shares of one row that are computed for company."""
        self._forward = forward
        self._pad = pad
        self._ops = ops
        self._block_size = block_size
        self._drawn = none_drawn(device)  # (R,) the tokens of the newest step

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Pending:
        """All of the plan is on its way: a step behind it may be launched before this one is collected."""
        if not plan.shares:
            return Pending(plan, None)
        shares = self._pad(plan.shares)
        logits = self._forward(build_batch(shares, self._block_size, self._drawn))
        if num_padding := len(shares) - len(plan.shares):
            logits = logits[:-num_padding]  # each has one row
        drawn = sampler.draw(self._ops, logits, plan.shares)
        self._drawn = drawn.tokens
        return Pending(plan, drawn)
