"""Choosing tokens on the CPU without sorting the vocabulary.

Greedy rows take one pass over all of them. A drawn token is almost always among the likeliest few hundred, which a
partial sort finds in a fraction of a sort's time; how much mass the others have is one more pass. Where those are not
enough to know the answer, more are sorted. Each row's token depends on its own logits alone, to the bit.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.ops import SamplingRow

# At V = 49,152 a partial sort of 64 takes about as long as one softmax, of 1,024 a few times that, of all 40 times.
# Where the k-th likeliest token has 1 / k^1.5 of the likeliest's probability, one draw in 10 needs the second and one
# in 40 the last.
NUM_CANDIDATES = (64, 1024)

# logits (R, V) -> the largest of each row, NaN if there is one, and the lowest id that has it
Greatest = Callable[[Tensor], tuple[Tensor, Tensor]]


def _greatest(logits: Tensor) -> tuple[Tensor, Tensor]:
    largest, tokens = logits.max(dim=1)
    return largest, tokens


@dataclass(frozen=True)
class _Candidates:
    """The likeliest tokens of one row in the order of the definition, without a gap."""

    logits: NDArray[np.float64]  # (n,) falling, equal ones by rising id
    ids: NDArray[np.int64]  # (n,)
    are_all: bool  # nothing else can be drawn


def sample(logits: Tensor, rows: Sequence[SamplingRow], greatest: Greatest = _greatest) -> Tensor:
    """As the definition, but that draws within 1e-6 of a boundary between two tokens may fall on its other side."""
    largest, tokens = greatest(logits)
    tokens.numpy()[~np.isfinite(largest.numpy())] = -1
    drawn = [i for i, row in enumerate(rows) if row.temperature > 0 and tokens[i] >= 0]
    if drawn:
        tokens[drawn] = torch.tensor(_draw_all(logits[drawn], largest[drawn], [rows[i] for i in drawn]))
    return tokens


def _draw_all(logits: Tensor, largest: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    masses = _masses(logits, largest, rows)
    likeliest = _likeliest(logits, NUM_CANDIDATES[0])
    return [
        _draw(row_logits, candidates, row, mass)
        for row_logits, candidates, row, mass in zip(logits, likeliest, rows, masses, strict=True)
    ]


def _masses(logits: Tensor, largest: Tensor, rows: Sequence[SamplingRow]) -> list[float]:
    """The mass of each row's whole vocabulary relative to its likeliest token's; NaN where top-k makes it no matter."""
    masses = [math.nan] * len(rows)
    whole = [i for i, row in enumerate(rows) if not row.top_k]
    if whole:
        temperature = torch.tensor([rows[i].temperature for i in whole])
        probabilities = (logits[whole] - largest[whole, None]).div_(temperature[:, None]).softmax(dim=1)
        for i, mass in zip(whole, probabilities.amax(dim=1).double().reciprocal().tolist(), strict=True):
            masses[i] = mass
    return masses


def _likeliest(logits: Tensor, num: int) -> Iterator[_Candidates]:
    """For each row its `num` likeliest tokens, less those as likely as the last: others of those may be cut off."""
    if num >= logits.shape[1]:
        top, ids = logits.sort(dim=1, descending=True, stable=True)
        for row_top, row_ids in zip(top.double().numpy(), ids.numpy(), strict=True):
            yield _Candidates(row_top, row_ids, are_all=True)
        return
    top, ids = logits.topk(num, dim=1, sorted=False)
    for row_top, row_ids in zip(top.double().numpy(), ids.numpy(), strict=True):
        order = np.lexsort((row_ids, -row_top))[: (row_top > row_top.min()).sum()]
        yield _Candidates(row_top[order], row_ids[order], are_all=row_top.min() == -np.inf)


def _draw(logits: Tensor, candidates: _Candidates, row: SamplingRow, mass: float) -> int:
    """One row's token; `candidates` are tried first."""
    token = _settle(candidates, row, mass)
    sizes = iter((*NUM_CANDIDATES[1:], len(logits)))  # the whole vocabulary settles every draw
    while token is None:
        token = _settle(next(_likeliest(logits[None], next(sizes))), row, mass)
    return token


def _settle(candidates: _Candidates, row: SamplingRow, whole_mass: float) -> int | None:
    """The row's token if the candidates are enough to know it. In numpy, whose calls cost a tenth of torch's."""
    top = candidates.logits[: row.top_k or None]
    is_closed = candidates.are_all or len(top) == row.top_k  # nothing but these can be drawn
    if not len(top) or (row.top_k and not is_closed):
        return None
    mass = np.exp((top - top[0]) / row.temperature)
    cumulative = mass.cumsum()
    total = cumulative[-1] if is_closed else whole_mass
    num_kept = max(1, int(((cumulative - mass < row.top_p * total) & (mass >= row.min_p)).sum()))
    if is_closed or num_kept < len(top):  # the end of what may be drawn is in sight
        cumulative = cumulative[:num_kept]
        total = cumulative[-1]
    elif row.top_p < 1 or row.min_p > 0 or cumulative[-1] <= row.uniform * total:
        return None
    return int(candidates.ids[np.searchsorted(cumulative, row.uniform * total, side="right")])


def logprobs(logits: Tensor, chosen: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """As the definition, the likeliest tokens by a partial sort."""
    scores = logits.float().log_softmax(dim=1)  # (R, V)
    top = _top_ids(logits, num_top)
    return scores.gather(1, chosen[:, None])[:, 0], top, scores.gather(1, top)


def _top_ids(logits: Tensor, num_top: int) -> Tensor:
    """(R, num_top) the likeliest tokens of each row, in order."""
    if not num_top:
        return torch.empty(len(logits), 0, dtype=torch.int64)
    rows = [torch.from_numpy(c.ids[:num_top]) for c in _likeliest(logits, max(num_top + 1, NUM_CANDIDATES[0]))]
    if any(len(ids) < num_top for ids in rows):  # more ties than candidates
        return logits.sort(dim=1, descending=True, stable=True).indices[:, :num_top]
    return torch.stack(rows) if rows else torch.empty(0, num_top, dtype=torch.int64)
