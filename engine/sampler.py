"""From rows of logits to accepted tokens.

Owns the random numbers. Each is a hash of (seed, choice, position), so a token depends on its own sequence alone: not on
the batch around it, on how the prompt was cut into chunks, on preemption, or on whether drafts were tried. The choosing
itself is `Ops.sample`; nothing here knows where logits come from.
"""

from dataclasses import replace
from hashlib import blake2b
from itertools import islice

import torch
from torch import Tensor

from engine.sequence import Accepted, Share
from engine.speculative import verify
from engine.types import Logprob
from kernels.ops import Ops, SamplingRow

UNIFORM_BITS = 53  # what a double holds exactly: the largest uniform is 1 - 2^-53, never 1


def accept(ops: Ops, logits: Tensor, shares: list[Share]) -> list[Accepted]:
    """What each share brings, from its rows of logits (R, V) fp32, which come in the order of the shares.

    A share with a row that is not a number, or with nothing left to choose, brings an error; the others do not notice.
    """
    if not len(logits):
        return [Accepted() for _ in shares]
    sampled = ops.sample(logits, [row for share in shares for row in sampling_rows(share)])  # (R,)
    tokens = iter(sampled.tolist())
    brought = [_verified(share, list(islice(tokens, share.num_rows))) for share in shares]
    return _with_logprobs(ops, logits, shares, brought)


def sampling_rows(share: Share) -> list[SamplingRow]:
    """How each of the share's rows becomes the token behind it."""
    sampling = share.sequence.request.sampling
    rows = []
    for position in range(share.first_row + 1, share.stop + 1):  # of the tokens to be sampled
        is_early = position - share.sequence.num_prompt < sampling.tokens_min
        rows.append(
            SamplingRow(
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
                uniform=uniform(sampling.seed, share.sequence.choice, position) if sampling.temperature else 0.0,
                banned=sampling.stop_token_ids if is_early else (),
            )
        )
    return rows


def uniform(seed: int, choice: int, position: int) -> float:
    """The one random number in [0, 1) behind the token at `position`, counted from the prompt's start.

    Absolute positions let a sequence that is taken up elsewhere, its output having become prompt, go on as it would have.
    """
    digest = blake2b(b"%d %d %d" % (seed, choice, position), digest_size=8).digest()
    return (int.from_bytes(digest) >> 64 - UNIFORM_BITS) / (1 << UNIFORM_BITS)


def _verified(share: Share, sampled: list[int]) -> Accepted:
    tokens = verify(share.drafts, sampled)
    if -1 in tokens:
        return Accepted(error="the model's output is not finite, or every token it could choose is banned")
    return Accepted(tokens)


def _with_logprobs(ops: Ops, logits: Tensor, shares: list[Share], brought: list[Accepted]) -> list[Accepted]:
    """The accepted tokens of those who asked have their logprobs."""
    rows: list[int] = []  # into logits
    chosen: list[int] = []
    num_top, first_row = 0, 0
    for share, accepted in zip(shares, brought, strict=True):
        wanted = share.sequence.request.sampling.num_logprobs
        if wanted is not None:
            rows += range(first_row, first_row + len(accepted.tokens))
            chosen += accepted.tokens
            num_top = max(num_top, wanted)
        first_row += share.num_rows
    if not rows:
        return brought
    found = ops.logprobs(logits[rows], torch.tensor(chosen, device=logits.device), num_top)
    lines = zip(chosen, *(column.tolist() for column in found), strict=True)
    return [
        accepted
        if (wanted := share.sequence.request.sampling.num_logprobs) is None
        else replace(accepted, logprobs=[_line(*line, wanted) for line in islice(lines, len(accepted.tokens))])
        for share, accepted in zip(shares, brought, strict=True)
    ]


def _line(
    token: int, logprob: float, top_tokens: list[int], top_logprobs: list[float], num_top: int
) -> tuple[Logprob, tuple[Logprob, ...]]:
    top = map(Logprob, top_tokens[:num_top], top_logprobs)
    return Logprob(token, logprob), tuple(top)
