"""Drafts by a model: a smaller one, the target with fewer experts for each token, or a draft layer of the target's.

Owns the drafter's passes: in each, every sequence that drafts gets its next draft, chosen as the target would choose
it, with the position's own random number and steering: the more alike the two models are, the more is kept under
sampling too. What the drafter must know of a sequence is in a cache, which follows the sequence by the engine's one
rule: tokens that should be computed, and tokens that are.

Fewer experts write into the target's own cache. The past is the target's, exactly; what they write stands at pending
tokens, all of which the same step computes, so the target writes over it before it reads it. A model of its own has a
cache of its own, in the same blocks: a block's number says where a token is in both. So has a layer for multi-token
prediction. The states that it reads the target leaves in the blocks, and its own, behind its drafts, stand at pending
tokens again.
"""

from collections.abc import Callable, Mapping
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from msgspec.structs import replace
from torch import Tensor

from engine import sampler
from engine.batch import Batch, build_batch, none_drawn
from engine.sequence import Proposed, Sequence, Share
from kernels.ops import Ops


class DraftCache(Protocol):
    """What is in the drafter's cache."""

    @property
    def shift(self) -> int:
        """How many places before its own a token stands in it; so the first tokens of a sequence have no place."""
        ...

    def num_computed(self, sequence: Sequence) -> int:
        """How many of the sequence's first tokens."""
        ...

    def write(self, share: Share) -> None:
        """The share is being computed into it."""
        ...


class SharedCache:
    """The target's: in it is what the target computed, and nothing needs to be noted."""

    shift = 0

    def num_computed(self, sequence: Sequence) -> int:
        """What the target's are."""
        return sequence.num_computed

    def write(self, share: Share) -> None:
        """Into places that the target writes over."""


class OwnCache:
    """A cache of the drafter's own, in the target's blocks.

    It falls behind while nobody drafts, and catches up when somebody does. A full block is known by its key, like the
    target's, so that sequences with a prefix in common compute it once, and a preempted one finds what it had.

    In a layer for multi-token prediction each token stands one place before its own, beside the target's state of that
    place. For drafts the layer has states of its own, so what is accepted of them it computes anew.
    """

    def __init__(self, block_size: int, shift: int = 0) -> None:
        """`shift`: 1 for a layer for multi-token prediction; as many tokens behind a block are in its key."""
        self.shift = shift
        self._block_size = block_size
        self._keys: dict[int, bytes] = {}  # by block: what is in it, all of it
        self._known: WeakKeyDictionary[Sequence, _Written] = WeakKeyDictionary()

    def num_computed(self, sequence: Sequence) -> int:
        """Up to the first token that is not as it was drafted, or that never was there."""
        written = self._known.get(sequence)
        if written is None or written.num_preemptions != sequence.num_preemptions:
            written = self._known[sequence] = _Written(sequence.num_preemptions, self.shift)
        written.keep(sequence.tokens)
        written.tried = []  # what is left was rejected
        self._remember(sequence, written)
        written.num_kept = max(written.num_kept, self._num_found(sequence, written.num_kept))
        return written.num_kept

    def write(self, share: Share) -> None:
        """Whatever its blocks held, they hold it no more."""
        sequence, written = share.sequence, self._known[share.sequence]
        for place in places(share, self.shift, self._block_size):
            self._keys.pop(sequence.blocks[place], None)
        written.num_known = min(written.num_known, (share.start - self.shift) // self._block_size)
        has_drafts = share.stop > len(sequence.tokens)
        if not (has_drafts and self.shift):
            written.tried += share.tokens
        if not has_drafts:
            written.keep(sequence.tokens)
            self._remember(sequence, written)

    def _num_found(self, sequence: Sequence, start: int) -> int:
        """Tokens in the blocks behind the first `start` that another sequence filled."""
        place = (start - self.shift) // self._block_size
        known = min(len(sequence.block_keys), (len(sequence.tokens) - 1 - self.shift) // self._block_size)
        while place < known and self._keys.get(sequence.blocks[place]) == sequence.block_keys[place]:
            place += 1
        return place * self._block_size + self.shift

    def _remember(self, sequence: Sequence, written: "_Written") -> None:
        """Others may find the full blocks."""
        num_full = min((written.num_kept - self.shift) // self._block_size, len(sequence.block_keys))
        for place in range(written.num_known, num_full):
            self._keys[sequence.blocks[place]] = sequence.block_keys[place]
        written.num_known = max(written.num_known, num_full)


class _Written:
    """How far one sequence is in a cache: `num_kept` of its tokens, and behind them some on trial."""

    def __init__(self, num_preemptions: int, num_kept: int) -> None:
        self.num_preemptions = num_preemptions
        self.num_kept = num_kept
        self.num_known = 0  # blocks whose keys were noted
        self.tried: list[int] = []

    def keep(self, tokens: list[int]) -> None:
        """Of those on trial, the ones that are the sequence's own are kept, but for its newest token."""
        num_old = self.num_kept
        for token in self.tried:
            if self.num_kept >= len(tokens) - 1 or token != tokens[self.num_kept]:
                break
            self.num_kept += 1
        self.tried = self.tried[self.num_kept - num_old :]


class ModelDrafter:
    """A drafter that computes. `forward` is a decoder's over the cache that `kept` tells of."""

    def __init__(
        self,
        forward: Callable[[Batch], Tensor],
        ops: Ops,
        kept: DraftCache,
        *,
        block_size: int,
        device: torch.device,
        tokens_max: int,
        context_max: int,
    ) -> None:
        """`tokens_max`: of one pass. `context_max`: what the drafter's model can take."""
        self._forward = forward
        self._ops = ops
        self._kept = kept
        self._block_size = block_size
        self._drawn = none_drawn(device)
        self._tokens_max = tokens_max
        self._context_max = context_max

    @property
    def num_seen_behind(self) -> int:
        """As many as tokens stand before their places."""
        return self._kept.shift

    def can_draft(self, sequence: Sequence) -> bool:
        """Whether its context takes the sequence and a draft, and it has a token to draft from."""
        return self._kept.shift < len(sequence.tokens) < self._context_max

    @torch.inference_mode()
    def propose(self, wanted: Mapping[Sequence, int]) -> Proposed:
        """One draft for each sequence a pass. In the first they catch up; who is too far behind for it gets none."""
        proposed = Proposed({sequence: [] for sequence in wanted}, dict.fromkeys(wanted, 0))
        shares = self._first_shares(list(wanted))
        num_passes = 0
        while shares:
            num_passes += 1
            chosen = self._pass(shares, proposed.drafts)
            for share in shares:
                proposed.nums_computed[share.sequence] += len(share.tokens)
            for sequence, token in chosen.items():
                proposed.drafts[sequence].append(token)
            room = {s: min(wanted[s], self._context_max - len(s.tokens)) for s in chosen}
            shares = [_next_share(s, proposed.drafts[s]) for s in chosen if len(proposed.drafts[s]) < room[s]]
        return Proposed(proposed.drafts, {s: n for s, n in proposed.nums_computed.items() if n}, num_passes)

    def _first_shares(self, sequences: list[Sequence]) -> list[Share]:
        """The tokens of each that its cache lacks, within the limit of a pass.

        Who lacks a block that another one is about to fill waits for the next step, and finds it then.
        """
        shares: list[Share] = []
        filled: set[int] = set()
        num_left = self._tokens_max
        for sequence in sequences:
            start = self._kept.num_computed(sequence)
            tokens = sequence.tokens[start : start + num_left]
            has_caught_up = start + len(tokens) == len(sequence.tokens)
            share = Share(sequence, start, tokens, num_rows=int(has_caught_up))
            stands_in = places(share, self._kept.shift, self._block_size)
            blocks = {sequence.blocks[place] for place in stands_in} if tokens else filled
            if not blocks & filled and tokens:
                shares.append(share)
                filled |= blocks
                num_left -= len(tokens)
        return shares

    def _pass(self, shares: list[Share], drafts: Mapping[Sequence, list[int]]) -> dict[Sequence, int]:
        """The next draft of each share's sequence that has caught up, if anything may follow there."""
        for share in shares:
            self._kept.write(share)
        placed = [replace(share, start=share.start - self._kept.shift) for share in shares]
        logits = self._forward(build_batch(placed, self._block_size, self._drawn))
        drafting = [share for share in shares if share.num_rows]
        return sampler.draft(self._ops, logits, drafting, drafts)


def places(share: Share, shift: int, block_size: int) -> range:
    """Which blocks of its sequence's table the share's tokens stand in."""
    return range((share.start - shift) // block_size, (share.stop - 1 - shift) // block_size + 1)


def _next_share(sequence: Sequence, drafts: list[int]) -> Share:
    return Share(sequence, len(sequence.tokens) + len(drafts) - 1, drafts[-1:], num_rows=1)
