"""`tokenmill demo` as a user runs it: a process of its own, with a tiny model in place of the one that it fetches."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny_models import tiny_mixtral
from tests.tiny_tokenizer import save_byte_level

ROOT = Path(__file__).parents[1]
RUN_S = 110  # below a test's own limit; on an idle machine the demo takes 15 s


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Knows 400 tokens and no sense, and has room for the longest of the demo's prompts."""
    folder = tiny_mixtral(tmp_path_factory.mktemp("demo"), vocab_size=400, max_position_embeddings=2048)
    return save_byte_level(folder)


def demo(tmp_path: Path, *arguments: str) -> "subprocess.Popen[str]":
    """The command, with its temporary folders where they can be counted."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TOKENMILL_")}
    return subprocess.Popen(
        [sys.executable, "-m", "worker", "demo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment | {"TMPDIR": str(tmp_path)},
    )


def left_running(tmp_path: Path) -> list[str]:
    """Command lines of processes that mention the demo's temporary folder, or were given it as theirs."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            about = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue
        if os.fsencode(tmp_path) in about:
            found.append((process / "cmdline").read_text().replace("\0", " "))
    return found


@pytest.mark.slow
def test_it_answers_and_bills_every_request_and_leaves_nothing_behind(tmp_path, kafka, model):
    run = demo(tmp_path, "--model", str(model), "--brokers", kafka.brokers, "--json")
    out, err = run.communicate(timeout=RUN_S)
    assert run.returncode == 0, err
    *events, figures = [json.loads(line) for line in out.splitlines()]
    answers = [event for event in events if "response" in event]
    assert len({answer["custom_id"] for answer in answers}) == len(answers) == 20
    assert any("sequence" in event for event in events), "one is streamed"
    assert figures["num_answered"] == 20
    assert figures["difference"] == "0.000000000000"
    assert figures["tokens_cached"] > 100, "the second wave found the rules in the cache"
    assert figures["tokens_out"] == sum(one["response"]["body"]["usage"]["completion_tokens"] for one in answers)
    assert list(tmp_path.glob("tokenmill-demo*")) == []
    assert left_running(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_nothing_running(tmp_path, model, number):
    run = demo(tmp_path, "--model", str(model))
    assert run.stderr is not None
    said = [next(run.stderr)]
    while "starting a worker" not in said[-1]:
        said.append(next(run.stderr))
    time.sleep(1)  # in the middle of it
    assert len(left_running(tmp_path)) >= 3, "the demo, its broker and its worker"
    run.send_signal(number)
    _, err = run.communicate(timeout=RUN_S)
    assert run.returncode == 130
    assert "Traceback" not in err
    assert left_running(tmp_path) == []
    assert list(tmp_path.glob("tokenmill-demo*")) == []
