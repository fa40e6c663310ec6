"""What a request does to the model's logits before a token is chosen: penalties, biases and bans.

Owns the arithmetic, in plain torch and so the same on every backend, and how often each token of a sequence has come.
Choosing is `Ops.sample`'s. A sequence that asks for nothing here has no `Steering`, and costs nothing.

For a token that has come c times in the answer so far, with the model's logit l, in this order:

    l / r if l > 0, else l * r            r = repetition_penalty, if it is in the prompt or c > 0 (arXiv 1909.05858)
    - frequency_penalty * c
    - presence_penalty, if c > 0          both as OpenAI defines them: of the answer alone
    + logit_bias
    - infinity                            if it is a stop token and tokens_min are not there yet
"""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.types import Sampling


@dataclass(frozen=True)
class Edit:
    """What happens to one row of logits, at the n tokens whose logits change."""

    ids: NDArray[np.int64]  # (n,) no token twice
    factors: NDArray[np.float64]  # (n,) a logit above 0 is divided by it, any other multiplied
    offsets: NDArray[np.float64]  # (n,) then added


class Steering:
    """One sequence's penalties, biases and bans, and all that they must know of its tokens.

    It reads on where it has stopped, so a token costs the same however long the sequence is, and a sequence that is
    taken up from its tokens alone steers as it would have.
    """

    def __init__(self, sampling: Sampling, prompt: tuple[int, ...]) -> None:
        self._sampling = sampling
        self._stops = sampling.stop_token_ids if sampling.tokens_min else ()
        self._counts_tokens = _has_penalty(sampling)
        self._num_prompt = self._num_read = len(prompt)
        bias = dict(sampling.logit_bias)
        repeated = dict.fromkeys(prompt if sampling.repetition_penalty != 1 else ())
        # Parallel arrays of the tokens whose logits may change: those that will, and later those that have come.
        self._slots = {token: slot for slot, token in enumerate({**bias, **dict.fromkeys(self._stops), **repeated})}
        self._ids = array("q", self._slots)
        self._in_prompt = array("b", (token in repeated for token in self._slots))
        self._bias = array("d", (bias.get(token, 0.0) for token in self._slots))
        self._counts = array("q", bytes(8 * len(self._slots)))
        self._stop_slots = [self._slots[token] for token in self._stops]

    def edits(self, tokens: list[int], drafts: list[int]) -> list[Edit]:
        """Of the row behind the last of the sequence's tokens, and of the row behind each of the drafts after it."""
        self._count(tokens[self._num_read :], 1)
        self._num_read = len(tokens)
        num_output = len(tokens) - self._num_prompt
        edits = [self._edit(num_output)]
        for place, draft in enumerate(drafts, start=1):
            self._count([draft], 1)
            edits.append(self._edit(num_output + place))
        self._count(drafts, -1)
        return edits

    def _edit(self, num_output: int) -> Edit:
        sampling, counts = self._sampling, np.array(self._counts)
        has_come = counts > 0
        offsets = np.array(self._bias) - sampling.frequency_penalty * counts - sampling.presence_penalty * has_come
        if num_output < sampling.tokens_min:
            offsets[self._stop_slots] = -np.inf
        factors = np.where(has_come | np.array(self._in_prompt, dtype=bool), sampling.repetition_penalty, 1.0)
        return Edit(np.array(self._ids), factors, offsets)

    def _count(self, tokens: list[int], by: int) -> None:
        for token in tokens if self._counts_tokens else ():
            slot = self._slots.setdefault(token, len(self._ids))
            if slot == len(self._ids):
                self._ids.append(token)
                self._in_prompt.append(0)
                self._bias.append(0.0)
                self._counts.append(0)
            self._counts[slot] += by


def steering_of(sampling: Sampling, prompt: tuple[int, ...]) -> Steering | None:
    """A new sequence's steering; None where its logits stay as the model made them."""
    bans = sampling.tokens_min and sampling.stop_token_ids
    return Steering(sampling, prompt) if _has_penalty(sampling) or sampling.logit_bias or bans else None


def steer(logits: Tensor, edits: Iterable[tuple[int, Edit]]) -> Tensor:
    """The logits (R, V) with these edits of their rows; the argument stays as it is, and is returned if there are none.

    No logit that is not finite becomes so: a row that must fail still does.
    """
    numbered = list(edits)
    if not numbered:
        return logits

    def send(array: NDArray[np.int64] | NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(array).to(logits.device)

    rows = send(np.repeat([row for row, _ in numbered], [len(edit.ids) for _, edit in numbered]))
    ids = send(np.concatenate([edit.ids for _, edit in numbered]))
    factors = send(np.concatenate([edit.factors for _, edit in numbered])).to(logits.dtype)
    offsets = send(np.concatenate([edit.offsets for _, edit in numbered])).to(logits.dtype)
    steered = logits.clone()
    own = logits[rows, ids]
    steered[rows, ids] = torch.where(own > 0, own / factors, own * factors) + offsets
    return steered


def _has_penalty(sampling: Sampling) -> bool:
    penalties = (sampling.frequency_penalty, sampling.presence_penalty, sampling.repetition_penalty)
    return penalties != (0, 0, 1)
