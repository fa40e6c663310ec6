"""What the CPU benchmark asks for, how it talks to its contenders, and what its table claims."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.cpu.contest import Result, Started
from benchmarks.cpu.loads import LOADS
from benchmarks.cpu.peers import CONTENDERS, Contender, NotInstalled
from benchmarks.cpu.report import Report

OURS, THEIRS = "tokenmill int8", "llama.cpp q8_0"


def result(contender: str, tokens_per_s: float, *, load: str = "A", foreign_cores: float = 0.0) -> Result:
    return Result(
        contender=contender,
        load=load,
        round=1,
        tokens_per_s=tokens_per_s,
        first_token_s=0.5,
        foreign_cores=foreign_cores,
        peak_bytes=10**9,
    )


def report(*results: Result) -> Report:
    made = Report(machine="a machine", checkpoint="a model", results=list(results))
    made.versions.update((one.contender, "1") for one in results)
    return made


def test_the_loads_are_those_that_the_published_figures_are_for() -> None:
    assert {name: len(load) for name, load in LOADS.items()} == {"A": 1, "B": 16, "C": 32}
    assert sum(len(prompt) for prompt, _ in LOADS["C"]) == 7893
    assert sum(num_tokens for _, num_tokens in LOADS["C"]) == 5035


def test_a_lead_is_over_the_nearest_peer_by_weights_with_no_more_bits() -> None:
    made = report(
        result("tokenmill bf16", 50), result("tokenmill int8", 90), result(THEIRS, 60), result("vllm bf16", 75)
    )
    assert made.lead("A") == (90 / 75, OURS, "vllm bf16")
    made = report(result("tokenmill bf16", 50), result(THEIRS, 10), result("vllm bf16", 25))
    assert made.lead("A")[0] == 2.0, "bf16 has more bits than q8_0, so that it may not be compared with it"


def test_disturbed_passes_count_only_where_there_are_no_others() -> None:
    made = report(result(OURS, 10, foreign_cores=0.5), result(OURS, 100), result(OURS, 90, foreign_cores=0.1))
    assert made.speed(OURS, "A") == 95
    assert report(result(OURS, 10, foreign_cores=0.5)).speed(OURS, "A") == 10


def test_whoever_could_not_take_part_is_in_the_table() -> None:
    made = report(result(OURS, 10), result(THEIRS, 5))
    made.missing["vllm bf16"] = "there is no wheel"
    assert "vllm bf16 did not take part: there is no wheel." in made.table()
    assert "A (one stream, 128 + 128 tokens): tokenmill int8 is 2.00 times as fast" in made.table()
    assert made.picture().startswith("<svg")


def contender(script: str) -> Contender:
    return replace(CONTENDERS[OURS], command=lambda *_: [sys.executable, "-c", script])


def test_a_contender_is_asked_by_name_of_the_load_whatever_it_prints_itself(tmp_path: Path) -> None:
    script = """
from benchmarks.cpu.contender import serve
def start():
    print("chatter")
    def play(load, run):
        run.first_token()
        run.num_tokens = sum(num_tokens for _, num_tokens in load)
    return "version 1", play
serve(start)
"""
    with Started(contender(script), tmp_path, tmp_path, tmp_path / "log") as one:
        assert one.version == "version 1"
        played = one.play("B", 3)
        assert (played.contender, played.load, played.round) == (OURS, "B", 3)
        assert played.tokens_per_s > 0
        assert played.peak_bytes > 10**6


def test_a_contender_that_ends_at_its_start_is_named_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(NotInstalled, match="no such processor"):
        Started(contender("raise SystemExit('no such processor')"), tmp_path, tmp_path, tmp_path / "log")
