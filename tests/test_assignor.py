"""The group's leader deals out partitions: levelled topic by topic, and whoever held one keeps it if that is fair."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.coordinator.protocol import ConsumerProtocolMemberMetadata
from hypothesis import given
from hypothesis import strategies as st

from worker.brokers.kafka_assignor import VERSION, KeepingAssignor

TOPICS = {"batch": 12, "handoff": 12, "requests": 12}
Shares = dict[str, dict[str, list[int]]]  # member -> topic -> numbers


class Member:
    """One consumer's assignor, and the generation that its group knows it by."""

    def __init__(self) -> None:
        self.generation = -1
        self.assignor = KeepingAssignor(lambda: self.generation)


class Group:
    """Members that come and go."""

    def __init__(self, topics: dict[str, int] | None = None) -> None:
        self.topics = topics or TOPICS
        self.members: dict[str, Member] = {}
        self.generation = 0
        self.cluster: Any = SimpleNamespace(partitions_for_topic=lambda topic: set(range(self.topics[topic])) or None)

    def rebalance(self, *names: str) -> Shares:
        """These are the members now; what each has."""
        self.generation += 1
        told = {name: self.members.setdefault(name, Member()).assignor.metadata(self.topics) for name in names}
        dealt = self.members[names[0]].assignor.assign(self.cluster, told)
        for name in names:
            self.members[name].generation = self.generation
            self.members[name].assignor.on_assignment(dealt[name])
        return {name: dict(share.assignment) for name, share in dealt.items()}


def moved(before: Shares, after: Shares) -> int:
    """How many partitions another has now."""
    return sum(owners(before)[partition] != member for partition, member in owners(after).items())


def owners(shares: Shares) -> dict[tuple[str, int], str]:
    found = [
        (topic, number, name) for name, own in shares.items() for topic, numbers in own.items() for number in numbers
    ]
    assert len({(topic, number) for topic, number, _ in found}) == len(found), "two have the same partition"
    return {(topic, number): name for topic, number, name in found}


def test_each_topic_is_levelled_by_itself():
    shares = Group().rebalance("a", "b", "c")
    assert all(len(numbers) == 4 for own in shares.values() for numbers in own.values())
    assert len(owners(shares)) == 36


def test_a_newcomer_gets_its_share_and_no_other_partition_moves():
    group = Group()
    before = group.rebalance("a", "b")
    assert moved(before, group.rebalance("a", "b", "c")) == 12


def test_the_partitions_of_who_leaves_are_dealt_out_and_no_other_moves():
    group = Group()
    before = group.rebalance("a", "b", "c")
    after = group.rebalance("a", "c")
    assert moved(before, after) == 12
    assert all(set(before[name][topic]) <= set(after[name][topic]) for name in "ac" for topic in TOPICS)


def test_where_nobody_comes_or_goes_nothing_moves_whatever_the_division_leaves():
    group = Group({"batch": 3, "handoff": 7, "requests": 11})
    names = ("a", "b", "c", "d", "e")
    before = group.rebalance(*names)
    assert group.rebalance(*names) == before
    loads = [sum(map(len, own.values())) for own in before.values()]
    assert max(loads) - min(loads) <= 1  # the rests go to different members


def test_what_the_division_leaves_stays_with_whom_it_was():
    group = Group({"requests": 3})
    before = group.rebalance("b")
    assert moved(before, group.rebalance("a", "b")) == 1


def test_who_slept_through_a_rebalance_gets_back_nothing_that_has_moved_since():
    group = Group()
    group.rebalance("a", "zombie")
    before = group.rebalance("a", "b")
    after = group.rebalance("a", "b", "zombie")
    assert moved(before, after) == 12


def test_who_is_told_by_the_group_that_it_is_unknown_has_held_nothing():
    group = Group()
    before = group.rebalance("a", "b")
    group.members["b"].generation = -1
    after = group.rebalance("a", "b")
    assert moved(before, after) == 0  # nobody else says so


@pytest.mark.parametrize("said", [b"", b"\xff\xff", b"\x92\x00\x81\xa1\xff\x90"], ids=["nothing", "noise", "no UTF-8"])
def test_a_member_whose_words_cannot_be_read_is_one_that_held_nothing(said):
    group = Group()
    group.rebalance("a")
    stranger = {"stranger": ConsumerProtocolMemberMetadata(VERSION, list(TOPICS), said)}
    dealt = group.members["a"].assignor.assign(group.cluster, stranger)
    assert sum(len(numbers) for _, numbers in dealt["stranger"].assignment) == 36


def test_a_topic_that_is_not_known_yet_is_dealt_out_later():
    group = Group({"batch": 0, "requests": 2})
    assert [own["requests"] for own in group.rebalance("a", "b").values()] == [[0], [1]]


@given(
    st.dictionaries(st.sampled_from("xyz"), st.integers(0, 9), min_size=1),
    st.lists(st.sets(st.sampled_from("abcdef"), min_size=1), min_size=1, max_size=6),
)
def test_whoever_came_and_went_before_each_partition_has_one_owner_and_no_topic_is_unfair(topics, memberships):
    group = Group(topics)
    for names in memberships:
        shares = group.rebalance(*sorted(names))
    assert len(owners(shares)) == sum(topics.values())
    for topic in topics:
        sizes = Counter(len(own[topic]) for own in shares.values())
        assert max(sizes) - min(sizes) <= 1
