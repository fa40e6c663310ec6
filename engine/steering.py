"""What a request does to the model's logits before a token is chosen: penalties, biases, bans and a grammar.

Owns the arithmetic, in plain torch and so the same on every backend, and what it must know of a sequence's tokens: how
often each has come, and where in the grammar they stand. Choosing is `Ops.sample`'s. A sequence that asks for nothing
here has no `Steering`, and costs nothing.

For a token that has come c times in the answer so far, with the model's logit l, in this order:

    l / r if l > 0, else l * r            r = repetition_penalty, if it is in the prompt or c > 0 (arXiv 1909.05858)
    - frequency_penalty * c
    - presence_penalty, if c > 0          both as OpenAI defines them: of the answer alone
    + logit_bias
    - infinity                            if it is a stop token and tokens_min are not there yet
    - infinity                            if the grammar does not allow it

Where the grammar allows nothing but stop tokens, they are not banned: an answer that is complete ends.
"""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from engine.constraint import Matcher
from engine.types import Request, Sampling

# (256, 8): what a byte of a mask adds to eight logits. Eight at once cost a twentieth of one at a time.
_OFFSETS_OF_BYTE = torch.from_numpy(
    np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0.0, -np.inf)
)


@dataclass(frozen=True)
class Edit:
    """What happens to one row of logits: at the n tokens whose logits change, and at all that the grammar forbids."""

    ids: NDArray[np.int64]  # (n,) no token twice
    factors: NDArray[np.float64]  # (n,) a logit above 0 is divided by it, any other multiplied
    offsets: NDArray[np.float64]  # (n,) then added
    mask: NDArray[np.uint8] | None  # a bit for each token, lowest first: 0 if it may not come; None: all may


class Steering:
    """One sequence's penalties, biases, bans and grammar, and all that they must know of its tokens.

    It reads on where it has stopped, so a token costs the same however long the sequence is, and a sequence that is
    taken up from its tokens alone steers as it would have.
    """

    def __init__(self, request: Request) -> None:
        self._sampling = sampling = request.sampling
        self._matcher: Matcher | None = request.constraint.start() if request.constraint else None
        self._stops = sampling.stop_token_ids if sampling.tokens_min else ()
        self._counts_tokens = _has_penalty(sampling)
        self._num_prompt = self._num_read = len(request.prompt)
        bias = dict(sampling.logit_bias)
        repeated = dict.fromkeys(request.prompt if sampling.repetition_penalty != 1 else ())
        # Parallel arrays of the tokens whose logits may change: those that will, and later those that have come.
        self._slots = {token: slot for slot, token in enumerate({**bias, **dict.fromkeys(self._stops), **repeated})}
        self._ids = array("q", self._slots)
        self._in_prompt = array("b", (token in repeated for token in self._slots))
        self._bias = array("d", (bias.get(token, 0.0) for token in self._slots))
        self._counts = array("q", bytes(8 * len(self._slots)))
        self._stop_slots = [self._slots[token] for token in self._stops]

    def edits(self, tokens: list[int], drafts: list[int]) -> list[Edit]:
        """Of the row behind the last of the sequence's tokens, and of the row behind each of the drafts after it.

        None behind drafts that complete the answer: nothing follows there. Raises ConstraintFailed.
        """
        self._read(tokens)
        num_output = len(tokens) - self._num_prompt
        edits = [self._edit(num_output)]
        tried: list[int] = []
        for draft in drafts:
            tried.append(draft)
            self._count([draft], 1)
            if self._advance([draft]):
                break
            edits.append(self._edit(num_output + len(tried)))
        self._count(tried, -1)
        self._rewind(len(tried))
        return edits

    def allowed(self, tokens: list[int], drafts: list[int]) -> list[int]:
        """The drafts up to the first that the grammar forbids behind the sequence's tokens: the others would lose."""
        if not self._matcher:
            return drafts
        self._read(tokens)
        return drafts[: self._matcher.num_allowed(drafts)]

    def num_complete(self, tokens: list[int], accepted: list[int]) -> int | None:
        """How many of these tokens, behind the sequence's own, make its answer complete; None where they do not."""
        self._read(tokens)
        num_advanced = self._advance(accepted)
        self._rewind(num_advanced or len(accepted))
        return num_advanced

    def _read(self, tokens: list[int]) -> None:
        new, self._num_read = tokens[self._num_read :], len(tokens)
        self._count(new, 1)
        self._advance(new)

    def _edit(self, num_output: int) -> Edit:
        sampling, counts, is_early = self._sampling, np.array(self._counts), num_output < self._sampling.tokens_min
        has_come = counts > 0
        offsets = np.array(self._bias) - sampling.frequency_penalty * counts - sampling.presence_penalty * has_come
        if is_early and not self._matcher:
            offsets[self._stop_slots] = -np.inf
        factors = np.where(has_come | np.array(self._in_prompt, dtype=bool), sampling.repetition_penalty, 1.0)
        return Edit(np.array(self._ids), factors, offsets, self._mask(is_early))

    def _mask(self, is_early: bool) -> NDArray[np.uint8] | None:
        if not self._matcher:
            return None
        mask = np.frombuffer(self._matcher.mask(), dtype=np.uint8)
        if not is_early:
            return mask
        unended = mask.copy()
        for token in self._stops:
            unended[token // 8] &= ~np.uint8(1 << token % 8)
        return unended if unended.any() else mask

    def _count(self, tokens: list[int], by: int) -> None:
        for token in tokens if self._counts_tokens else ():
            slot = self._slots.setdefault(token, len(self._ids))
            if slot == len(self._ids):
                self._ids.append(token)
                self._in_prompt.append(0)
                self._bias.append(0.0)
                self._counts.append(0)
            self._counts[slot] += by

    def _advance(self, tokens: list[int]) -> int | None:
        """The grammar has read these tokens, up to the one that completes the answer: how many; None if none does."""
        for num_read, token in enumerate(tokens if self._matcher else (), start=1):
            if self._matcher and self._matcher.advance(token):
                return num_read
        return None

    def _rewind(self, num_tokens: int) -> None:
        if self._matcher and num_tokens:
            self._matcher.rewind(num_tokens)


def steering_of(request: Request) -> Steering | None:
    """A new sequence's steering; None where its logits stay as the model made them."""
    sampling = request.sampling
    bans = sampling.tokens_min and sampling.stop_token_ids
    asks = _has_penalty(sampling) or sampling.logit_bias or bans or request.constraint
    return Steering(request) if asks else None


def steer(logits: Tensor, edits: Iterable[tuple[int, Edit]]) -> Tensor:
    """The logits (R, V) with these edits of their rows; the argument stays as it is, and is returned if there are none.

    No logit that is not finite becomes so: a row that must fail still does.
    """
    numbered = list(edits)
    if not numbered:
        return logits

    def send(array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(logits.device)

    rows = send(np.repeat([row for row, _ in numbered], [len(edit.ids) for _, edit in numbered]))
    ids = send(np.concatenate([edit.ids for _, edit in numbered]))
    factors = send(np.concatenate([edit.factors for _, edit in numbered])).to(logits.dtype)
    offsets = send(np.concatenate([edit.offsets for _, edit in numbered])).to(logits.dtype)
    steered = logits.clone()
    own = logits[rows, ids]
    steered[rows, ids] = torch.where(own > 0, own / factors, own * factors) + offsets
    masks = {row: edit.mask for row, edit in numbered if edit.mask is not None}
    if masks:
        bits, table = send(np.stack(list(masks.values()))).int(), _OFFSETS_OF_BYTE.to(logits)
        for row, row_bits in zip(masks, bits, strict=True):  # one at a time: a row's offsets stay in the cache
            steered[row] += functional.embedding(row_bits, table).flatten()[: logits.shape[1]]
    return steered


def _has_penalty(sampling: Sampling) -> bool:
    penalties = (sampling.frequency_penalty, sampling.presence_penalty, sampling.repetition_penalty)
    return penalties != (0, 0, 1)
