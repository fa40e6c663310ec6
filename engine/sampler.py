"""From rows of logits to accepted tokens.

Owns the random numbers. Each is a hash of (seed, choice, position), so a token depends on its own sequence alone: not
on the batch around it, on how the prompt was cut into chunks, on preemption, or on whether drafts were tried. The
choosing itself is `Ops.sample`, from logits as `steering.py` leaves them; logprobs are of the logits as the model made
them. Nothing here knows where those come from.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice

import numpy as np
from msgspec.structs import replace
from torch import Tensor

from engine.constraint import ConstraintFailed
from engine.sequence import Accepted, Sequence, Share, TokenLogprobs
from engine.speculative import verify
from engine.steering import Edit, steer
from engine.types import Logprob
from kernels.ops import Ops, SamplingRow
from kernels.transfer import Returning, send

GREEDY = SamplingRow(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, uniform=0.0)  # nothing else counts then
UNIFORM_BITS = 53  # what a double holds exactly: the largest uniform is 1 - 2^-53, never 1


@dataclass(frozen=True)
class Drawn:
    """What a step has drawn, while it is on its way to the host."""

    tokens: Tensor  # (R,) int64 where the logits are: what the next step may go on with before the host has them
    _shares: list[Share]
    _failures: dict[Sequence, str]
    _returning: Returning  # the tokens, the columns of their logprobs if anybody asked, those of scored prompts if any
    _has_logprobs: bool

    def accepted(self) -> list[Accepted]:
        """What each share brings, in their order; waits for the device.

        A share with a row that is not a number, or with nothing left to choose, brings an error; the others do not
        notice.
        """
        tokens, *columns = self._returning.wait()
        logprobs, scores = (columns[:3], columns[3:]) if self._has_logprobs else ([], columns)
        sampled = tokens.tolist()
        brought = [_verified(share, sampled, self._failures) for share in self._shares]
        brought = _with_logprobs(self._shares, brought, logprobs) if logprobs else brought
        return _with_scores(self._shares, brought, scores) if scores else brought


def draw(ops: Ops, logits: Tensor, shares: list[Share]) -> Drawn:
    """Tokens are drawn from the shares' rows of logits (R, V) fp32, which come in the order of the shares.

    Each share's rows are first those that score its prompt, then those that tokens are sampled from.
    """
    logits, scores = _scored(ops, logits, shares)
    edits, failures = _edits(shares)
    tokens = ops.sample(steer(logits, edits), _rows(shares))
    logprobs = _logprobs(ops, logits, tokens, shares)
    return Drawn(tokens, shares, failures, Returning([tokens, *logprobs, *scores]), bool(logprobs))


def draft(ops: Ops, logits: Tensor, shares: list[Share], drafts: Mapping[Sequence, list[int]]) -> dict[Sequence, int]:
    """What a drafter's logits (S, V) make of each share's last row, chosen as the target's would be.

    `drafts`: those that the sequences already have. None for one that is complete or cannot go on behind them.
    """
    edits: list[tuple[int, Edit]] = []
    rows: dict[int, Share] = {}
    for row, share in enumerate(shares):
        own = _edit_behind(share.sequence, drafts[share.sequence])
        if own is not None:
            rows[row] = share
            edits += [(row, edit) for edit in own]
    if not rows:
        return {}
    tokens = ops.sample(steer(logits, edits)[list(rows)], [sampling_rows(share)[-1] for share in rows.values()])
    return {share.sequence: token for share, token in zip(rows.values(), tokens.tolist(), strict=True) if token >= 0}


def _edit_behind(sequence: Sequence, drafts: list[int]) -> list[Edit] | None:
    """What the sequence does to the row behind its last draft; None where nothing may follow."""
    if not sequence.steering:
        return []
    try:
        edits = sequence.steering.edits(sequence.tokens, drafts)
    except ConstraintFailed:
        return None  # the target's own row will tell
    return edits[-1:] if len(edits) > len(drafts) else None


def _rows(shares: list[Share]) -> list[SamplingRow]:
    """How each row of the step becomes the token behind it."""
    if any(share.sequence.request.sampling.temperature for share in shares):
        return [row for share in shares for row in sampling_rows(share)]
    return [GREEDY] * sum(share.num_rows for share in shares)


def sampling_rows(share: Share) -> list[SamplingRow]:
    """How each of the share's rows becomes the token behind it."""
    sampling = share.sequence.request.sampling
    if not sampling.temperature:
        return [GREEDY] * share.num_rows
    return [
        SamplingRow(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            uniform=uniform(sampling.seed, share.sequence.choice, position),
        )
        for position in range(share.first_row + 1, share.stop + 1)  # of the tokens to be sampled
    ]


def uniform(seed: int, choice: int, position: int) -> float:
    """The one random number in [0, 1) behind the token at `position`, counted from the prompt's start.

    Absolute positions let a sequence that another engine takes up go on as it would have.
    """
    digest = blake2b(b"%d %d %d" % (seed, choice, position), digest_size=8).digest()
    return (int.from_bytes(digest) >> 64 - UNIFORM_BITS) / (1 << UNIFORM_BITS)


def _edits(shares: list[Share]) -> tuple[list[tuple[int, Edit]], dict[Sequence, str]]:
    """What the sequences that steer do to which rows, and why those fail whose grammar cannot go on."""
    edits: list[tuple[int, Edit]] = []
    failures: dict[Sequence, str] = {}
    for share in shares:
        if share.sequence.steering and share.num_rows:
            try:
                own = share.sequence.steering.edits(share.sequence.tokens, share.drafts)
                edits += enumerate(own, start=share.first_logits)
            except ConstraintFailed as error:
                failures[share.sequence] = str(error)
    return edits, failures


def _verified(share: Share, sampled: list[int], failures: dict[Sequence, str]) -> Accepted:
    """What a share brings, of the tokens (R,) that were sampled from the step's rows."""
    if failures and share.sequence in failures:
        return Accepted(error=failures[share.sequence])
    tokens = sampled[share.first_logits : share.first_logits + share.num_rows]
    if len(tokens) > 1:
        tokens = verify(share.drafts, tokens)
    if -1 in tokens:
        return Accepted(error="the model's output is not finite, or every token it could choose is banned")
    return Accepted(tokens)


def _scored(ops: Ops, logits: Tensor, shares: list[Share]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The rows that tokens are sampled from; and of the others the columns of `Ops.logprobs`, if there are any."""
    if not any(share.num_scored for share in shares):
        return logits, ()
    prompt = [token for share in shares for token in share.scored_tokens]
    counts = [count for share in shares for count in (share.num_scored, share.num_rows)]
    is_scored = np.repeat(np.arange(len(counts)) % 2 == 0, counts)
    arrays = [np.flatnonzero(is_scored), np.flatnonzero(~is_scored), np.array(prompt, dtype=np.int64)]
    scored, sampled, chosen = send(arrays, logits.device)
    num_top = max(share.sequence.request.sampling.num_prompt_logprobs or 0 for share in shares if share.num_scored)
    return logits[sampled], ops.logprobs(logits[scored], chosen, num_top)


def _with_scores(shares: list[Share], brought: list[Accepted], columns: list[Tensor]) -> list[Accepted]:
    """The prompts that asked have the logprobs of their tokens."""
    lines = zip(*(column.tolist() for column in columns), strict=True)
    results = []
    for share, accepted in zip(shares, brought, strict=True):
        num_top = share.sequence.request.sampling.num_prompt_logprobs or 0
        pairs = zip(share.scored_tokens, islice(lines, share.num_scored), strict=True)
        results.append(replace(accepted, scores=[_of_token(token, line, num_top) for token, line in pairs]))
    return results


def _logprobs(ops: Ops, logits: Tensor, tokens: Tensor, shares: list[Share]) -> tuple[Tensor, ...]:
    """The columns of `Ops.logprobs` for every row of those who asked; none where nobody did."""
    rows: list[int] = []  # into logits
    for share in shares:
        if share.sequence.request.sampling.num_logprobs is not None:
            rows += range(share.first_logits, share.first_logits + share.num_rows)
    if not rows:
        return ()
    (index,) = send([np.array(rows, dtype=np.int64)], logits.device)
    num_top = max(share.sequence.request.sampling.num_logprobs or 0 for share in shares)
    return ops.logprobs(logits[index], tokens[index].clamp(min=0), num_top)  # a row without a token brings an error


def _with_logprobs(shares: list[Share], brought: list[Accepted], columns: list[Tensor]) -> list[Accepted]:
    """The accepted tokens of those who asked have their logprobs."""
    lines = zip(*(column.tolist() for column in columns), strict=True)
    results = []
    for share, accepted in zip(shares, brought, strict=True):
        num_top = share.sequence.request.sampling.num_logprobs
        if num_top is None:
            results.append(accepted)
            continue
        own = list(islice(lines, share.num_rows))  # also of drafts that were not kept
        pairs = zip(accepted.tokens, own, strict=False)
        results.append(replace(accepted, logprobs=[_of_token(token, line, num_top) for token, line in pairs]))
    return results


def _of_token(token: int, line: tuple[float, list[int], list[float]], num_top: int) -> TokenLogprobs:
    """A token's own logprob, and those of the `num_top` likeliest."""
    own, top_tokens, top_logprobs = line
    return Logprob(token, own), tuple(map(Logprob, top_tokens[:num_top], top_logprobs))
