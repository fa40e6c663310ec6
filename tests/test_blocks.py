"""Blocks are held, shared, remembered and evicted, and the books always agree."""

import pytest

from engine.blocks import BlockCache
from engine.sequence import Sequence
from engine.types import Request, Sampling


def sequence(tokens: list[int], salt: str = "") -> Sequence:
    request = Request(id=0, prompt=tuple(tokens), sampling=Sampling(tokens_max=100), cache_salt=salt)
    return Sequence(request=request, choice=0, rank=(0, 0, 0), length_max=len(tokens) + 100)


def computed(blocks: BlockCache, tokens: list[int], salt: str = "") -> Sequence:
    """A sequence with all its tokens in the cache and told of."""
    new = sequence(tokens, salt)
    assert blocks.claim(new, spare=0) is not None
    new.reach(len(tokens))
    blocks.remember(new)
    return new


def test_a_prefix_is_found_in_whole_blocks_and_leaves_a_token_to_compute():
    blocks = BlockCache(20, 4)
    first = computed(blocks, list(range(8)))
    for tokens, num_cached in [(range(8), 4), (range(9), 8), (range(12), 8), (range(7), 4), (range(1, 9), 0)]:
        other = sequence(list(tokens))
        assert blocks.claim(other, spare=0) == num_cached
        assert other.blocks[: num_cached // 4] == first.blocks[: num_cached // 4]
        blocks.check([first, other])
        blocks.release(other)


def test_a_block_is_known_by_all_that_stands_before_it():
    blocks = BlockCache(20, 4)
    computed(blocks, [1, 1, 1, 1, 5, 6, 7, 8])
    assert blocks.claim(sequence([2, 2, 2, 2, 5, 6, 7, 8, 9]), spare=0) == 0


def test_a_block_that_looks_ahead_is_shared_by_those_who_go_on_alike():
    """What a layer for multi-token prediction keeps at a block's last place hangs on the token behind it."""
    blocks = BlockCache(20, 4, num_seen_behind=1)
    first = sequence(list(range(10)))
    blocks.claim(first, spare=0)
    first.reach(9)
    blocks.remember(first)
    for tokens, num_cached in [([*range(8), 9], 4), ([*range(9), 0], 8), ([*range(5), 0], 4), ([*range(4), 0], 0)]:
        other = sequence(tokens)
        assert blocks.claim(other, spare=0) == num_cached
        blocks.release(other)


def test_another_salt_finds_nothing():
    blocks = BlockCache(20, 4)
    computed(blocks, list(range(8)), salt="red")
    assert blocks.claim(sequence(list(range(9)), salt="blue"), spare=0) == 0
    assert blocks.claim(sequence(list(range(9)), salt="red"), spare=0) == 8


def test_only_computed_blocks_are_found():
    blocks = BlockCache(20, 4)
    half = sequence(list(range(12)))
    blocks.claim(half, spare=0)
    half.reach(7)
    blocks.remember(half)
    assert blocks.claim(sequence(list(range(12))), spare=0) == 4


def test_without_room_nothing_changes():
    blocks = BlockCache(4, 4)
    first = computed(blocks, list(range(8)))
    other = sequence(list(range(16)))
    assert blocks.claim(other, spare=1) is None  # 2 shared, 2 new, none to spare
    assert not blocks.extend(first, 17)
    blocks.check([first])
    assert blocks.claim(other, spare=0) == 8


def test_an_idle_prefix_is_not_room_and_prefix_at_once():
    blocks = BlockCache(4, 4)
    blocks.release(computed(blocks, list(range(8))))
    assert blocks.num_available == 4
    assert blocks.claim(sequence(list(range(17))), spare=0) is None  # needs 5 in all
    assert blocks.claim(sequence(list(range(16))), spare=0) == 8


def test_the_least_recently_used_is_evicted_from_its_end():
    blocks = BlockCache(6, 4)
    blocks.release(computed(blocks, [1] * 8))
    blocks.release(computed(blocks, [2] * 8))
    blocks.release(sequence_of(blocks, [3] * 12))  # two free blocks and a third: the end of the older prefix
    for tokens, num_cached in [([1] * 9, 4), ([2] * 9, 8)]:
        probe = sequence(tokens)
        assert blocks.claim(probe, spare=0) == num_cached
        blocks.release(probe)
        blocks.check([])


def sequence_of(blocks: BlockCache, tokens: list[int]) -> Sequence:
    """A sequence that holds blocks but has computed nothing."""
    new = sequence(tokens)
    assert blocks.claim(new, spare=0) is not None
    return new


def test_a_block_held_twice_is_free_after_the_second_release():
    blocks = BlockCache(4, 4)
    first = computed(blocks, list(range(8)))
    second = sequence_of(blocks, list(range(9)))
    blocks.release(first)
    assert blocks.num_held == 3
    blocks.check([second])
    blocks.release(second)
    assert blocks.num_held == 0
    blocks.check([])


def test_forgotten_blocks_are_not_found():
    blocks = BlockCache(4, 4)
    failed = computed(blocks, list(range(8)))
    blocks.forget(failed)
    blocks.release(failed)
    blocks.check([])
    assert blocks.claim(sequence(list(range(9))), spare=0) == 0


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda blocks, held: blocks._free.append(held.blocks[0]), "two places"),
        (lambda blocks, held: blocks._free.pop(), "lost"),
        (lambda blocks, held: blocks._free.append(blocks._free[0]), "free twice"),
        (lambda blocks, held: blocks._holders.__setitem__(held.blocks[0], 2), "miscounted"),
        (lambda blocks, held: blocks._keys.__setitem__(held.blocks[0], None), "wrong block"),
    ],
)
def test_the_check_finds_damaged_books(damage, complaint):
    blocks = BlockCache(8, 4)
    held = computed(blocks, list(range(8)))
    damage(blocks, held)
    with pytest.raises(AssertionError, match=complaint):
        blocks.check([held])
