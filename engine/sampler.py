"""From rows of logits to accepted tokens.

Owns the random numbers. Each is a hash of (seed, choice, position), so a token depends on its own sequence alone: not
on the batch around it, on how the prompt was cut into chunks, on preemption, or on whether drafts were tried. The
choosing itself is `Ops.sample`, from logits as `steering.py` leaves them; logprobs are of the logits as the model made
them. Nothing here knows where those come from.
"""

from dataclasses import replace
from hashlib import blake2b
from itertools import islice

import torch
from torch import Tensor

from engine.constraint import ConstraintFailed
from engine.sequence import Accepted, Sequence, Share, TokenLogprobs
from engine.speculative import verify
from engine.steering import Edit, steer
from engine.types import Logprob
from kernels.ops import Ops, SamplingRow

UNIFORM_BITS = 53  # what a double holds exactly: the largest uniform is 1 - 2^-53, never 1


def accept(ops: Ops, logits: Tensor, shares: list[Share]) -> list[Accepted]:
    """What each share brings, from its rows of logits (R, V) fp32, which come in the order of the shares.

    A share with a row that is not a number, or with nothing left to choose, brings an error; the others do not notice.
    """
    if not len(logits):
        return [Accepted() for _ in shares]
    edits, failures = _edits(shares)
    rows = [row for share in shares for row in sampling_rows(share)]
    tokens = iter(ops.sample(steer(logits, edits), rows).tolist())
    brought = [_verified(share, list(islice(tokens, share.num_rows)), failures) for share in shares]
    return _with_logprobs(ops, logits, shares, brought)


def sampling_rows(share: Share) -> list[SamplingRow]:
    """How each of the share's rows becomes the token behind it."""
    sampling = share.sequence.request.sampling
    return [
        SamplingRow(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            uniform=uniform(sampling.seed, share.sequence.choice, position) if sampling.temperature else 0.0,
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
    first_row = 0
    for share in shares:
        if share.sequence.steering and share.num_rows:
            try:
                own = share.sequence.steering.edits(share.sequence.tokens, share.drafts)
                edits += enumerate(own, start=first_row)
            except ConstraintFailed as error:
                failures[share.sequence] = str(error)
        first_row += share.num_rows
    return edits, failures


def _verified(share: Share, sampled: list[int], failures: dict[Sequence, str]) -> Accepted:
    if share.sequence in failures:
        return Accepted(error=failures[share.sequence])
    tokens = verify(share.drafts, sampled)
    if -1 in tokens:
        return Accepted(error="the model's output is not finite, or every token it could choose is banned")
    return Accepted(tokens)


def _with_logprobs(ops: Ops, logits: Tensor, shares: list[Share], brought: list[Accepted]) -> list[Accepted]:
    """The accepted tokens of those who asked have their logprobs."""
    wanted = [share.sequence.request.sampling.num_logprobs for share in shares]
    rows: list[int] = []  # into logits
    chosen: list[int] = []
    first_row = 0
    for share, accepted, num_top in zip(shares, brought, wanted, strict=True):
        if num_top is not None:
            rows += range(first_row, first_row + len(accepted.tokens))
            chosen += accepted.tokens
        first_row += share.num_rows
    if not rows:
        return brought
    num_top_max = max(num_top or 0 for num_top in wanted)
    lines = iter(_logprobs(ops, logits[rows], chosen, num_top_max))
    return [
        accepted
        if num_top is None
        else replace(accepted, logprobs=[(own, top[:num_top]) for own, top in islice(lines, len(accepted.tokens))])
        for accepted, num_top in zip(brought, wanted, strict=True)
    ]


def _logprobs(ops: Ops, logits: Tensor, chosen: list[int], num_top: int) -> list[TokenLogprobs]:
    """Of each row's chosen token, and of its `num_top` likeliest ones."""
    columns = ops.logprobs(logits, torch.tensor(chosen, device=logits.device), num_top)
    own, top_tokens, top_logprobs = (column.tolist() for column in columns)
    return [
        (Logprob(token, logprob), tuple(map(Logprob, tokens, logprobs)))
        for token, logprob, tokens, logprobs in zip(chosen, own, top_tokens, top_logprobs, strict=True)
    ]
