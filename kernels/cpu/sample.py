"""Choosing tokens on the CPU without sorting the vocabulary.

Greedy rows take one pass over all of them. A drawn token is almost always among the likeliest few hundred, which a
partial sort finds in a twentieth of a sort's time; how much mass the others have is one more pass. Where those are not
enough to know the answer, more are sorted. Each row's token depends on its own logits alone, to the bit.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.ops import SamplingRow
from kernels.reference import first_beyond

# A partial sort of 256 takes about as long as one softmax; of 4,096 a sixth of a whole sort (V = 49,152).
NUM_CANDIDATES = (256, 4096)


@dataclass(frozen=True)
class _Candidates:
    """The likeliest tokens of one row in the order of the definition, without a gap."""

    logits: Tensor  # (n,) falling, equal ones by rising id
    ids: Tensor  # (n,)
    are_all: bool  # the whole vocabulary


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """As the definition, but that draws within 1e-6 of a boundary between two tokens may fall on its other side."""
    logits = _without_banned(logits, rows)
    largest, tokens = logits.max(dim=1)  # the lowest id on ties; NaN if there is one
    tokens[~largest.isfinite()] = -1
    drawn = [i for i, row in enumerate(rows) if row.temperature > 0 and tokens[i] >= 0]
    if drawn:
        tokens[drawn] = torch.tensor(_draw_all(logits[drawn], largest[drawn], [rows[i] for i in drawn]))
    return tokens


def _without_banned(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    banned = [(i, token) for i, row in enumerate(rows) for token in row.banned]
    if not banned:
        return logits
    logits = logits.clone()
    logits[tuple(torch.tensor(banned).T)] = -torch.inf
    return logits


def _draw_all(logits: Tensor, largest: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    masses = _masses(logits, largest, rows)
    likeliest = _likeliest(logits, NUM_CANDIDATES[0])
    return [
        _draw(row_logits, candidates, row, mass)
        for row_logits, candidates, row, mass in zip(logits, likeliest, rows, masses, strict=True)
    ]


def _masses(logits: Tensor, largest: Tensor, rows: Sequence[SamplingRow]) -> list[float]:
    """The mass of each row's whole vocabulary, relative to its likeliest token's."""
    temperature = torch.tensor([row.temperature for row in rows])[:, None]
    probabilities = ((logits - largest[:, None]) / temperature).softmax(dim=1)
    return probabilities.amax(dim=1).double().reciprocal().tolist()


def _likeliest(logits: Tensor, num: int) -> Iterator[_Candidates]:
    """For each row its `num` likeliest tokens, less those as likely as the last: others of those may be cut off."""
    are_all = num >= logits.shape[1]
    top, ids = logits.topk(min(num, logits.shape[1]), dim=1)
    ids, by_id = ids.sort(dim=1)
    top, order = top.gather(1, by_id).sort(dim=1, descending=True, stable=True)
    ids = ids.gather(1, order)
    num_certain = torch.full((len(top),), top.shape[1]) if are_all else (top > top[:, -1:]).sum(dim=1)
    for row_top, row_ids, n in zip(top, ids, num_certain.tolist(), strict=True):
        yield _Candidates(row_top[:n], row_ids[:n], are_all)


def _draw(logits: Tensor, candidates: _Candidates, row: SamplingRow, mass: float) -> int:
    """One row's token; `candidates` are tried first."""
    token = _settle(candidates, row, mass)
    sizes = iter((*NUM_CANDIDATES[1:], len(logits)))  # the whole vocabulary settles every draw
    while token is None:
        token = _settle(next(_likeliest(logits[None], next(sizes))), row, mass)
    return token


def _settle(candidates: _Candidates, row: SamplingRow, whole_mass: float) -> int | None:
    """The row's token if the candidates are enough to know it."""
    top = candidates.logits[: row.top_k or None].double()
    if not len(top):
        return None
    mass = ((top - top[0]) / row.temperature).exp()
    cumulative = mass.cumsum(0)
    is_closed = candidates.are_all or len(top) == row.top_k  # nothing but these can be drawn
    if row.top_k and not is_closed:
        return None
    total = float(cumulative[-1]) if is_closed else whole_mass
    num_kept = max(1, int(((cumulative - mass < row.top_p * total) & (mass >= row.min_p)).sum()))
    if is_closed or num_kept < len(top):  # the end of what may be drawn is in sight
        kept = cumulative[:num_kept]
        return int(candidates.ids[first_beyond(kept, row.uniform * kept[-1])])
    if row.top_p < 1 or row.min_p > 0 or cumulative[-1] <= row.uniform * total:
        return None
    return int(candidates.ids[first_beyond(cumulative, row.uniform * total)])


def logprobs(logits: Tensor, chosen: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """As the definition, the likeliest tokens by a partial sort."""
    scores = logits.float().log_softmax(dim=1)  # (R, V)
    top = _top_ids(logits, num_top)
    return scores.gather(1, chosen[:, None])[:, 0], top, scores.gather(1, top)


def _top_ids(logits: Tensor, num_top: int) -> Tensor:
    """(R, num_top) the likeliest tokens of each row, in order."""
    if not num_top:
        return torch.empty(len(logits), 0, dtype=torch.int64)
    rows = [candidates.ids[:num_top] for candidates in _likeliest(logits, max(num_top, NUM_CANDIDATES[0]))]
    if any(len(ids) < num_top for ids in rows):  # more ties than candidates
        return logits.sort(dim=1, descending=True, stable=True).indices[:, :num_top]
    return torch.stack(rows) if rows else torch.empty(0, num_top, dtype=torch.int64)
