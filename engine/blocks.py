"""Which block of the cache belongs to whom, and which still hold a prefix worth keeping.

Owns block numbers, never their contents: tensors are the runner's. A block is in exactly one of three places:

    free   holds nothing anyone could ask for
    held   by one or more sequences; several share it when their tokens up to its end are the same
    idle   held by nobody, but its prefix is known: it can be held again, or evicted, least recently used first

A full block is known by a key: sha256 over its parent's key and its own tokens, the first parent being the salt. So a
key names every token up to the block's end, and under different salts nobody can hit another's prefixes, nor tell by
the time it takes that they are there (CVE-2025-25183, CVE-2025-46570).
"""

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from hashlib import sha256

from engine.sequence import Sequence, block_table


class BlockCache:
    """The paged cache's book-keeping. One thread's."""

    def __init__(self, num_blocks: int, block_size: int, num_seen_behind: int = 0) -> None:
        """`num_seen_behind`: on so many tokens behind a block hangs what is in it, so its key names them too."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._num_seen_behind = num_seen_behind
        self._free = list(range(num_blocks))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._holders = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks  # by block
        self._blocks: dict[bytes, int] = {}  # by key

    @property
    def num_available(self) -> int:
        """Blocks that could be had now: nobody holds them."""
        return len(self._free) + len(self._idle)

    @property
    def num_held(self) -> int:
        """Blocks that sequences hold."""
        return self.num_blocks - self.num_available

    def claim(self, sequence: Sequence, spare: int) -> int | None:
        """The sequence holds blocks for all its tokens; what it returns is how many of them are already in the cache.

        None, and nothing has changed, where that would leave fewer than `spare` blocks available.
        """
        prefix = self._find_prefix(sequence)
        num_new = self._blocks_for(len(sequence.tokens)) - len(prefix)
        num_woken = sum(not self._holders[block] for block in prefix)
        if num_new + num_woken + spare > self.num_available:
            return None
        for block in prefix:
            self._hold(block)
        sequence.blocks = block_table(prefix + [self._take() for _ in range(num_new)])
        sequence.num_remembered = len(prefix)
        return len(prefix) * self.block_size

    def extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """The sequence holds blocks for `num_tokens` tokens; False, and nothing has changed, if there are too few."""
        if num_tokens <= len(sequence.blocks) * self.block_size:  # as in most steps
            return True
        num_new = self._blocks_for(num_tokens) - len(sequence.blocks)
        if num_new > self.num_available:
            return False
        for _ in range(num_new):
            sequence.blocks.append(self._take())
        return True

    def remember(self, sequence: Sequence) -> None:
        """Every full block of computed tokens can be found by others from now on.

        Where two sequences computed the same prefix side by side, the first block stays the known one.
        """
        num_full = sequence.num_computed // self.block_size
        if num_full == sequence.num_remembered:
            return
        keys = self._keys_of(sequence, num_full)
        for place in range(sequence.num_remembered, num_full):
            block = sequence.blocks[place]
            if keys[place] not in self._blocks:
                self._blocks[keys[place]] = block
                self._keys[block] = keys[place]
        sequence.num_remembered = num_full

    def release(self, sequence: Sequence) -> None:
        """The sequence holds nothing. Known blocks stay findable; a prefix's end is evicted before its beginning."""
        for block in reversed(sequence.blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if self._keys[block] is None:
                self._free.append(block)
            else:
                self._idle[block] = None
        sequence.blocks = block_table()
        sequence.num_remembered = 0

    def forget(self, sequence: Sequence) -> None:
        """Nobody will find the sequence's blocks: what they hold is not to be trusted."""
        for block in sequence.blocks:
            self._drop_key(block)

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Raise AssertionError unless the books agree with `sequences`, the only holders. For tests: O(blocks)."""
        held = Counter(block for sequence in sequences for block in sequence.blocks)
        free, idle = set(self._free), set(self._idle)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & idle, "a block is in two places"
        assert not (free | idle) & held.keys(), "a block is in two places"
        assert len(free) + len(idle) + len(held) == self.num_blocks, "a block is lost"
        assert all(self._holders[block] == held[block] for block in range(self.num_blocks)), "holders are miscounted"
        assert all(self._keys[block] == key for key, block in self._blocks.items()), "a key names the wrong block"
        assert sum(key is not None for key in self._keys) == len(self._blocks), "a block's key is unknown"
        assert all(self._keys[block] is not None for block in idle), "an idle block has no key"
        assert all(self._keys[block] is None for block in free), "a free block has a key"

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        """The known blocks of the longest prefix that leaves a token to compute: a successor is sampled from work."""
        prefix: list[int] = []
        for key in self._keys_of(sequence, sequence.num_reusable // self.block_size):
            block = self._blocks.get(key)
            if block is None:
                break
            prefix.append(block)
        return prefix

    def _keys_of(self, sequence: Sequence, num_blocks: int) -> list[bytes]:
        keys = sequence.block_keys
        while len(keys) < num_blocks:
            parent = keys[-1] if keys else sha256(sequence.request.cache_salt.encode()).digest()
            start = len(keys) * self.block_size
            tokens = array("q", sequence.tokens[start : start + self.block_size + self._num_seen_behind])
            keys.append(sha256(parent + tokens.tobytes()).digest())
        return keys[:num_blocks]

    def _hold(self, block: int) -> None:
        self._idle.pop(block, None)
        self._holders[block] += 1

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            self._drop_key(block)
        self._holders[block] = 1
        return block

    def _drop_key(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._blocks[key]
            self._keys[block] = None

    def _blocks_for(self, num_tokens: int) -> int:
        return blocks_for(num_tokens, self.block_size)


def blocks_for(num_tokens: int, block_size: int) -> int:
    """How many blocks the tokens of one sequence take."""
    return -(-num_tokens // block_size)
