"""An engine of several processes answers as one does, ends whole, and never outlives a part of itself."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
import torch

from engine.build import build, pick_device
from engine.config import EngineConfig
from engine.core import Core
from engine.errors import EngineMisconfigured, RankLost
from engine.thread import EngineThread
from engine.types import Request, Sampling
from tests.test_engine import greedy
from tests.tiny_models import tiny
from worker import start
from worker.config import Engine
from worker.errors import Fatal

pytestmark = pytest.mark.timeout(300)  # a follower imports torch, which takes seconds, and on busy cores a minute

HEARD_S = 10  # it is heard in milliseconds; the machine may be busy

# All that cuts and shares the work at once: chunks, preemption, drafts.
BUSY = {"cache_tokens": 112, "tokens_per_step_max": 16, "sequences_max": 4, "drafts_max": 3, "draft_cost": 0.0}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return tiny("mixtral", tmp_path_factory.mktemp("model"), seed=7)


@pytest.fixture(scope="module")
def expected(checkpoint) -> list[list[int]]:
    return greedy(engine(checkpoint))[0]


def engine(checkpoint: Path, **settings: Any) -> Core:
    torch.set_num_threads(1)
    defaults: dict[str, Any] = {"block_size": 4, "cache_tokens": 1024, "weights": "fp32", "threads": 1}
    return build(EngineConfig(**defaults | settings), checkpoint)


@contextmanager
def ending(core: Core) -> Iterator[Core]:
    try:
        yield core
    finally:
        core.followers.end()


@pytest.fixture(scope="module")
def two(checkpoint) -> Iterator[Core]:
    with ending(engine(checkpoint, ranks=2, **BUSY)) as core:
        yield core


@pytest.fixture(scope="module")
def two_with_whole_experts(checkpoint) -> Iterator[Core]:
    with ending(engine(checkpoint, ranks=2, experts="whole")) as core:
        yield core


@pytest.fixture(scope="module")
def four(checkpoint) -> Iterator[Core]:
    with ending(engine(checkpoint, ranks=4, cache_tokens=0, context_max=128)) as core:
        yield core


def test_two_ranks_have_the_tokens_of_one(two, expected):
    tokens, finished = greedy(two)
    assert tokens == expected
    assert sum(f.usage.num_preemptions for f in finished) > 0
    assert sum(f.usage.num_accepted for f in finished) > 0


def test_so_they_have_with_whole_experts_and_a_cached_prefix(two_with_whole_experts, expected):
    assert greedy(two_with_whole_experts)[0] == expected
    tokens, finished = greedy(two_with_whole_experts)
    assert tokens == expected
    assert sum(f.usage.num_cached for f in finished) > 0


def test_so_have_four_of_which_two_share_each_key_value_head(four, expected):
    assert greedy(four)[0] == expected


def test_an_engine_that_stops_ends_them(two):
    thread = EngineThread(two, lambda _result: None, lambda _error: None)
    thread.start()
    assert thread.stop(HEARD_S)
    assert [follower.process.poll() for follower in two.followers._followers] == [0]


def test_an_idle_engine_hears_that_a_rank_has_died(two_with_whole_experts):
    heard: Queue[BaseException] = Queue()
    EngineThread(two_with_whole_experts, lambda _result: None, heard.put).start()
    two_with_whole_experts.followers._followers[0].process.kill()
    error = heard.get(timeout=HEARD_S)
    assert isinstance(error, RankLost)
    assert str(error) == "rank 1 has ended: exit code -9"


def test_a_step_ends_in_which_a_rank_dies(four):
    """The others wait for the one that is stopped, and it never comes."""
    heard: Queue[BaseException] = Queue()
    thread = EngineThread(four, lambda _result: None, heard.put)
    victim = four.followers._followers[1].process
    os.kill(victim.pid, signal.SIGSTOP)
    thread.start()
    thread.submit(Request(id=1, prompt=(1, 2, 3), sampling=Sampling(tokens_max=5)))
    time.sleep(0.2)
    assert heard.empty()
    victim.kill()
    for _ in range(2):  # at once from whoever watches, and then from the step
        assert isinstance(heard.get(timeout=HEARD_S), RankLost)
    assert thread.stop(HEARD_S)


# Rank 0, in a process of its own: it says who follows, and is killed while it waits.
_LEADER = """
import sys
from pathlib import Path
from engine.build import build
from engine.config import EngineConfig
core = build(EngineConfig(ranks=2, threads=1, cache_tokens=64), Path(sys.argv[1]))
print(core.followers._followers[0].process.pid, flush=True)
sys.stdin.read()
"""


def test_no_rank_outlives_the_first(checkpoint):
    with subprocess.Popen(
        [sys.executable, "-c", _LEADER, checkpoint], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as leader:
        assert leader.stdout
        follower = int(leader.stdout.readline())
        leader.kill()
    ends_s = time.monotonic() + HEARD_S
    while _runs(follower) and time.monotonic() < ends_s:
        time.sleep(0.01)
    assert not _runs(follower)


def _runs(pid: int) -> bool:
    """A dead process that nobody has asked after yet does not run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_rank_that_does_not_come_up_is_told_with_how_it_ended(checkpoint, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RankLost, match="rank 1 has ended: exit code 1"):
        engine(checkpoint, ranks=2)


def test_what_cannot_be_shared_is_refused_before_any_rank_starts(checkpoint, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(EngineMisconfigured, match=r"ranks is 3, and layer 0 has 4 heads.*1, 2, 4 ranks"):
        engine(checkpoint, ranks=3)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"ranks": 2, "draft_experts": 1}, "for one rank only"),
        ({"ranks": 0}, "ranks is 0"),
        ({"ranks": 17}, "16 or less"),
        ({"experts": "half"}, "sharded, whole"),
    ],
)
def test_settings_that_are_none_are_refused(settings, text):
    with pytest.raises(EngineMisconfigured, match=text):
        EngineConfig(**settings)


def test_each_rank_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(EngineMisconfigured, match="ranks is 3, and there are 2 GPUs"):
        pick_device("cuda", 0, 3)
    with pytest.raises(EngineMisconfigured, match="'cuda:1' is one GPU, and there are 2 ranks"):
        pick_device("cuda:1", 0, 2)
    monkeypatch.setattr(torch, "empty", lambda _size, device: device)
    assert [pick_device("cuda", rank, 2) for rank in range(2)] == [torch.device("cuda:0"), torch.device("cuda:1")]


def test_a_worker_that_loses_a_rank_while_it_loads_ends(monkeypatch):
    def lose(*_arguments) -> Core:
        raise RankLost("rank 1 has ended: exit code -9")

    monkeypatch.setattr(start, "build", lose)
    with pytest.raises(Fatal, match="rank 1 has ended"):
        start._build(Engine(), Path())
