"""The command line: what it says, what it refuses, how it ends; against a real broker where a command needs one."""

import asyncio
import http.server
import io
import json
import re
import signal
import subprocess
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from schemas.codec import decode_request, encode, event_headers, header_text
from schemas.requests import Chat
from schemas.results import (
    AssistantMessage,
    Bill,
    ChatChoice,
    ChatResult,
    Chunk,
    Completion,
    CompletionTokensDetails,
    Failed,
    Input,
    PromptTokensDetails,
    Response,
    Timing,
    Usage,
)
from worker import cli
from worker.brokers.base import Outgoing
from worker.brokers.kafka_client import Sender, read_all, tail
from worker.brokers.kafka_settings import KafkaSettings
from worker.cli import COMMANDS, EXIT_USAGE, main
from worker.commands.answers import Teller, printable
from worker.commands.demo import REQUESTS
from worker.commands.watch import Tally
from worker.commands.worker import own_name
from worker.config import Topics
from worker.errors import Fatal, Misconfigured, Unavailable

SUBCOMMANDS = [
    *((name,) for name in ("demo", "worker", "healthcheck", "send", "watch")),
    *(("broker", name) for name in ("up", "down", "status")),
    *(("model", name) for name in ("fetch", "list", "inspect", "convert")),
    *(("topics", name) for name in ("create", "list")),
    *(("config", name) for name in ("show", "check")),
    ("ledger", "reconcile"),
    ("schema", "export"),
]


@pytest.fixture(autouse=True)
def bare(tmp_path, monkeypatch):
    """No settings but those that a test gives, and no models but those that it makes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("TOKENMILL_BROKERS", "TOKENMILL_CONFIG"):
        monkeypatch.delenv(name, raising=False)


class TestHelp:
    def test_it_lists_every_command_and_imports_none_of_them(self):
        heavy = ("torch", "aiokafka", "aiohttp", "opentelemetry", "tokenizers", "numpy", "worker.commands")
        program = (
            "import sys; from worker.cli import main; main(['--help']);"
            f"sys.exit(str([one for one in sys.modules if one.startswith({heavy!r})] or ''))"
        )
        run = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1]
        )
        assert run.stderr == "\n"
        assert all(command.summary in " ".join(run.stdout.split()) for command in COMMANDS)

    @pytest.mark.parametrize("command", SUBCOMMANDS, ids=" ".join)
    def test_every_command_explains_itself(self, capsys, command):
        assert main([*command, "--help"]) == 0
        text = capsys.readouterr().out
        assert f"Usage: tokenmill {' '.join(command)}" in text

    @pytest.mark.parametrize(
        "command", [one for one in SUBCOMMANDS if one[0] not in ("broker", "config")], ids=" ".join
    )
    def test_every_command_shows_an_example(self, capsys, command):
        main([*command, "--help"])
        assert re.search(rf"^    .*tokenmill.*{command[0]}", capsys.readouterr().out, re.MULTILINE)

    @pytest.mark.parametrize(
        "command",
        [
            ("demo",),
            ("worker",),
            ("send",),
            ("watch",),
            ("topics", "create"),
            ("topics", "list"),
            ("ledger", "reconcile"),
        ],
        ids=" ".join,
    )
    def test_every_command_that_talks_to_kafka_takes_the_brokers(self, capsys, command):
        main([*command, "--help"])
        assert "--brokers" in capsys.readouterr().out

    def test_every_command_is_in_the_list(self):
        here = Path(cli.__file__).with_name("commands")
        modules = {path.stem for path in here.glob("*.py")} - {"__init__", "answers", "output", "progress"}
        assert {command.name for command in COMMANDS} == modules
        assert {command[0] for command in SUBCOMMANDS} == modules


class TestHowItEnds:
    @pytest.mark.parametrize(
        "arguments", [["wroker"], ["worker", "--no-such-flag"], ["schema", "export"], ["send", "--count", "0", "x"]]
    )
    def test_a_wrong_command_line_is_one_line_and_exit_code_64(self, capsys, arguments):
        assert main(arguments) == EXIT_USAGE
        said = capsys.readouterr()
        assert said.err.startswith("tokenmill: ")
        assert said.err.count("\n") == 1
        assert said.out == ""

    @pytest.mark.parametrize("error", [Fatal, Unavailable, Misconfigured])
    def test_an_error_of_the_tree_is_one_line_and_its_own_exit_code(self, capsys, monkeypatch, error):
        def fail(*_: object) -> None:
            raise error("this is wrong; do that")

        monkeypatch.setattr("worker.commands.model.models_folder", fail)
        assert main(["model", "list"]) == error.exit_code
        assert capsys.readouterr().err == "tokenmill: this is wrong; do that\n"
        with pytest.raises(error):
            main(["model", "list", "--debug"])

    def test_a_reader_that_stops_reading_is_no_error(self):
        run = subprocess.run(
            f"{sys.executable} -m worker config show | head -n 1; exit ${{PIPESTATUS[0]}}",
            check=False, shell=True, executable="/bin/bash", capture_output=True, text=True,
            cwd=Path(__file__).parents[1],
        )  # fmt: skip
        assert run.stderr == ""
        assert run.returncode in (0, 141)

    def test_the_version_is_printed(self, capsys, monkeypatch):
        monkeypatch.setattr("importlib.metadata.version", lambda name: f"{name} 1.2.3")
        main(["--version"])
        assert capsys.readouterr().out.strip() == "tokenmill 1.2.3"


class TestWorkerNames:
    def test_two_workers_of_a_host_have_different_names_and_a_free_one_is_taken_again(self):
        with own_name("") as first:
            with own_name("") as second:
                assert first != second
            with own_name("") as third:
                assert third == second

    def test_the_name_of_a_killed_worker_is_free_at_once(self):
        program = (
            "from worker.commands.worker import own_name\nwith own_name('') as name: print(name, flush=True); input()"
        )
        command = [sys.executable, "-c", program]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=Path(__file__).parents[1]) as other:
            assert other.stdout
            taken = other.stdout.readline().strip()
            with own_name("") as mine:
                assert mine != taken
            other.send_signal(signal.SIGKILL)
            other.wait()
            with own_name("") as mine:
                assert mine == taken

    def test_a_worker_that_has_left_says_all_and_does_not_wait_for_pythons_own_end(self):
        program = (
            "import atexit, time\nfrom worker.drain import end_process\n"
            "atexit.register(time.sleep, 60)\nprint('left', end='')\nend_process(3)"
        )
        command = [sys.executable, "-c", program]
        run = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=30, check=False
        )
        assert (run.stdout, run.returncode) == ("left", 3)

    def test_a_name_that_was_given_is_kept(self):
        with own_name("ann") as name:
            assert name == "ann"

    def test_a_folder_of_another_user_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr("os.getuid", lambda: 12345)
        (tmp_path / "tokenmill-12345").mkdir()
        with pytest.raises(Misconfigured, match="--worker"), own_name(""):
            pass


class TestHealthcheck:
    @contextmanager
    def worker(self, status: int):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status if self.path == "/readyz" else 404)
                self.end_headers()
                self.wfile.write(b"loading the model")

            def log_message(self, *_: object) -> None:
                pass

        with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield str(server.server_port)
            server.shutdown()

    @pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
    def test_the_exit_code_says_whether_the_worker_is_ready(self, capsys, status, code):
        with self.worker(status) as port:
            assert main(["healthcheck", "--health.port", port]) == code
            assert main(["healthcheck", "--health.host", "0.0.0.0", "--health.port", port]) == code
        assert "loading the model" in "".join(capsys.readouterr())

    def test_no_worker_is_not_ready(self, capsys):
        with self.worker(200) as port:
            pass
        assert main(["healthcheck", "--health.port", port]) == 1
        assert "no worker answers" in capsys.readouterr().err


class TestModels:
    def test_a_model_is_described_from_its_headers(self, capsys, tmp_path):
        checkpoint(tmp_path / "cache/tokenmill/models/small")
        assert main(["model", "list", "--json"]) == 0
        (listed,) = json.loads(capsys.readouterr().out)
        assert main(["model", "inspect", "small", "--json"]) == 0
        inspected = json.loads(capsys.readouterr().out)
        assert inspected["engine"] is None
        assert (
            "vocab_size" in inspected["refusal"]
        )  # our engine needs to know it; the files can be described all the same
        assert {name: inspected[name] for name in listed} == listed
        assert (listed["name"], listed["parameters"], listed["bytes"], listed["formats"]) == ("small", 6, 12, ["BF16"])

    def test_a_file_that_is_no_safetensors_is_refused_by_name(self, capsys, tmp_path):
        checkpoint(tmp_path / "bad").joinpath("model.safetensors").write_bytes(b"\xff" * 64)
        assert main(["model", "inspect", str(tmp_path / "bad")]) == Misconfigured.exit_code
        assert "model.safetensors" in capsys.readouterr().err

    def test_only_the_demo_model_can_be_fetched(self, capsys):
        assert main(["model", "fetch", "gpt-7"]) == Misconfigured.exit_code
        assert "smollm2-moe" in capsys.readouterr().err


def test_the_schemas_are_written_one_file_for_each_kind(capsys, tmp_path):
    assert main(["schema", "export", str(tmp_path / "out"), "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert {Path(one).name for one in written} == {path.name for path in (tmp_path / "out").iterdir()}
    assert "tokenmill.request.v1.json" in {Path(one).name for one in written}
    assert all(json.loads(Path(one).read_bytes()) for one in written)


class TestDemoRequests:
    def test_there_are_twenty_and_each_is_a_valid_request(self):
        requests = [decode_request(line) for line in REQUESTS.read_bytes().splitlines()]
        assert len({request.custom_id for request in requests}) == 20

    def test_one_is_streamed_one_has_two_answers_and_two_share_a_prefix_in_different_waves(self):
        requests = [decode_request(line) for line in REQUESTS.read_bytes().splitlines()]
        assert sum(request.body.stream for request in requests) == 1
        assert sum(request.body.n == 2 for request in requests) == 1
        systems = [
            (request.body.messages[0].content, request.body.metadata)
            for request in requests
            if isinstance(request, Chat) and request.body.messages[0].role == "system"
        ]
        assert len(systems) == 2
        assert systems[0][0] == systems[1][0]
        assert [metadata for _, metadata in systems] == [None, {"wave": "2"}]


class TestWhatIsSaidOfAnAnswer:
    def test_what_a_model_writes_cannot_steer_the_terminal(self):
        assert printable("a\x1b[2Jb\x07\r\n\tc\u202ed") == "a\ufffd[2Jb\ufffd\ufffd\n\tc\ufffdd"

    def test_a_streamed_text_is_not_repeated_and_another_answer_does_not_break_into_its_line(self, capsys):
        teller, streamed, other = Teller(), place(1), place(2)
        for number, piece in enumerate(("One", " two")):
            teller.tell(chunk(streamed, number, piece))
        teller.tell(completion(other, "else"))
        teller.tell(chunk(streamed, 2, " three"))
        teller.tell(completion(streamed, "One two three"))
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "request-1 streams: One two"
        assert lines[2:4] == ["  else", "request-1 streams:  three"]
        assert "One two three" not in "\n".join(lines)
        assert (teller.num_answers, teller.num_failures) == (2, 0)

    def test_a_failure_says_its_code_and_counts(self, capsys):
        teller = Teller()
        teller.tell(completion(place(1), None))
        assert "CONTEXT_EXCEEDED, too long" in capsys.readouterr().out
        assert teller.num_failures == 1


def test_the_watched_sums_are_of_completions_and_costs():
    tally = Tally()
    for message in (completion(place(1), "a"), completion(place(2), None), completion(place(3), "b"), None):
        tally.add(message)
    assert (tally.num_completions, tally.num_failures, tally.tokens_in, tally.tokens_out) == (3, 1, 6, 8)
    screen = io.StringIO()
    Console(width=200, file=screen).print(tally.render())
    assert "3 answered, 1 failed" in screen.getvalue()
    assert "CONTEXT_EXCEEDED" in screen.getvalue()


@pytest.fixture(scope="module")
def prefix() -> str:
    """Topics of this module's own; a broker is shared by the whole run."""
    return f"cli_{uuid.uuid4().hex[:8]}"


@pytest.fixture
def flags(kafka, prefix) -> list[str]:
    """What leads a command to the topics, which exist."""
    given = ["--brokers", kafka.brokers, "--topics.prefix", prefix]
    assert main(["topics", "create", "--partitions", "3", *given]) == 0
    return given


class TestOnABroker:
    def test_topics_are_created_once_and_listed(self, capsys, kafka):
        given = ["--brokers", kafka.brokers, "--topics.prefix", f"cli_{uuid.uuid4().hex[:8]}", "--json"]
        assert main(["topics", "list", *given]) == 1
        assert {row["partitions"] for row in json.loads(capsys.readouterr().out)} == {0}
        assert main(["topics", "create", "--partitions", "3", *given]) == 0
        assert len(json.loads(capsys.readouterr().out)["created"]) == 7
        assert main(["topics", "create", "--partitions", "5", *given]) == 0
        assert json.loads(capsys.readouterr().out)["created"] == []
        assert main(["topics", "list", *given]) == 0
        assert {row["partitions"] for row in json.loads(capsys.readouterr().out)} == {3}

    def test_topics_that_are_missing_are_named_with_what_to_do(self, capsys, kafka):
        given = ["--brokers", kafka.brokers, "--topics.prefix", f"cli_{uuid.uuid4().hex[:8]}"]
        assert main(["ledger", "reconcile", *given]) == Misconfigured.exit_code
        assert "tokenmill topics create" in capsys.readouterr().err

    def test_prompts_become_requests_on_the_topic_of_their_tier(self, capsys, flags, kafka, prefix, monkeypatch):
        monkeypatch.setattr("sys.stdin", io.StringIO())  # a pipe that brings nothing
        for tier, topic in (("realtime", Topics(prefix=prefix).requests), ("batch", Topics(prefix=prefix).batch)):
            wishes = ["--max-tokens", "5", "--temperature", "0", "--n", "2", "--tenant", "ann", "--count", "3"]
            assert main(["send", "Say it.", "Again.", "--tier", tier, *wishes, "--json", *flags]) == 0
            sent = [json.loads(line) for line in capsys.readouterr().out.splitlines() if "custom_id" in line]
            assert len({one["custom_id"] for one in sent}) == 6
            records = {(one.place.partition, one.offset): one for one in records_of(kafka, topic)}
            for one in sent:
                record = records[one["input"]["partition"], one["input"]["offset"]]
                request = decode_request(record.value, record.headers)
                assert isinstance(request, Chat)
                assert request.custom_id == one["custom_id"] == header_text(record.headers, "ce_id")
                assert (request.tenant, request.body.n, request.body.temperature) == ("ann", 2, 0)
                assert (request.body.model, request.body.max_completion_tokens) == ("smollm2-moe", 5)

    def test_a_pipe_and_a_file_bring_a_prompt_a_line(self, capsys, flags, tmp_path, monkeypatch):
        (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
        capsys.readouterr()
        assert main(["send", "--file", "prompts.txt", *flags]) == 0
        with (tmp_path / "prompts.txt").open() as pipe:
            monkeypatch.setattr("sys.stdin", pipe)
            assert main(["send", *flags]) == 0
        assert capsys.readouterr().out.count("sent 2 requests") == 2

    def test_an_openai_batch_file_is_sent_as_it_is(self, capsys, flags):
        assert main(["send", "--file", str(REQUESTS), *flags]) == 0
        assert "sent 20 requests" in capsys.readouterr().out

    def test_of_a_batch_file_with_a_bad_line_nothing_is_sent(self, capsys, flags, kafka, prefix, tmp_path):
        topic = Topics(prefix=prefix).requests
        before = len(records_of(kafka, topic))
        (tmp_path / "bad.jsonl").write_bytes(REQUESTS.read_bytes() + b'{"custom_id": 1}\n')
        assert main(["send", "--file", "bad.jsonl", *flags]) == Misconfigured.exit_code
        assert "bad.jsonl, line 21" in capsys.readouterr().err
        assert len(records_of(kafka, topic)) == before

    def test_a_wish_that_a_batch_file_would_not_heed_is_refused(self, capsys, flags):
        assert main(["send", "--file", str(REQUESTS), "--max-tokens", "5", *flags]) == Misconfigured.exit_code

    def test_awaited_answers_are_printed_as_they_are_committed(self, capsys, flags, kafka, prefix):
        with answering(kafka, Topics(prefix=prefix), "It is so."):
            assert main(["send", "Is it?", "Is it so?", "--wait", "--wait-s", "30", "--json", *flags]) == 0
        answers = [json.loads(line) for line in capsys.readouterr().out.splitlines() if "response" in line]
        assert [one["response"]["body"]["choices"][0]["message"]["content"] for one in answers] == ["It is so."] * 2

    def test_a_failed_answer_is_an_exit_code_of_one(self, capsys, flags, kafka, prefix):
        with answering(kafka, Topics(prefix=prefix), None):
            assert main(["send", "Is it?", "--wait", "--wait-s", "30", *flags]) == 1
        assert "CONTEXT_EXCEEDED" in capsys.readouterr().out

    def test_answers_that_do_not_come_end_the_wait_with_what_to_look_for(self, capsys, flags):
        assert main(["send", "Is it?", "--wait", "--wait-s", "1", *flags]) == Unavailable.exit_code
        assert "1 of 1 requests are not answered" in capsys.readouterr().err

    def test_what_is_committed_is_watched_until_ctrl_c(self, capsys, flags, kafka, prefix):
        command = [sys.executable, "-m", "worker", "watch", "--from-start", *flags]
        for extra, expected in (["--json"], '"custom_id":"request-'), ([], "request-"):
            with answering(kafka, Topics(prefix=prefix), "It is so."):
                assert main(["send", "Is it?", "--wait", "--wait-s", "30", *flags]) == 0
            pipe, root = subprocess.PIPE, Path(__file__).parents[1]
            with subprocess.Popen([*command, *extra], cwd=root, stdout=pipe, stderr=pipe, text=True) as run:
                assert run.stdout
                assert expected in run.stdout.readline()
                run.send_signal(signal.SIGINT)
                assert run.communicate(timeout=20)[1] == ""
                assert run.returncode == 130

    def test_an_empty_ledger_reconciles(self, capsys, flags):
        capsys.readouterr()
        prefixless = [*flags[:3], f"cli_{uuid.uuid4().hex[:8]}"]
        main(["topics", "create", "--partitions", "1", *prefixless])
        capsys.readouterr()
        assert main(["ledger", "reconcile", "--json", *prefixless]) == 0
        assert json.loads(capsys.readouterr().out)["difference"] == "0.000000000000"

    def test_no_broker_is_one_line_and_exit_code_69(self, capsys):
        assert main(["topics", "list", "--brokers", "127.0.0.1:1"]) == Unavailable.exit_code
        assert "127.0.0.1:1" in capsys.readouterr().err


def records_of(kafka, topic: str):
    return asyncio.run(read_all(KafkaSettings(brokers=kafka.brokers), [topic]))


@contextmanager
def answering(kafka, topics: Topics, text: str | None):
    """A stand-in for a worker: answers whatever is requested from now on."""
    client, ready, stop = KafkaSettings(brokers=kafka.brokers), threading.Event(), threading.Event()

    async def serve() -> None:
        async with tail(client, [topics.requests], from_start=False) as records, Sender(client) as sender:
            ready.set()
            async for record in records:
                source = Input(topic=record.place.topic, partition=record.place.partition, offset=record.offset)
                message = completion(source, text)
                headers = event_headers(message, source="/test", subject=None, time_s=0)
                value = encode(message)
                answer = Outgoing(topic=topics.completions, key=record.key, value=value, headers=headers)
                await (await sender.send(answer))

    async def until_stopped() -> None:
        serving = asyncio.create_task(serve())
        while not stop.is_set() and not serving.done():  # set by another thread
            await asyncio.sleep(0.05)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=not serving.done())

    with ThreadPoolExecutor() as pool:
        worker = pool.submit(asyncio.run, until_stopped())
        try:
            assert ready.wait(20)
            yield
        finally:
            stop.set()
            worker.result()


def place(offset: int) -> Input:
    return Input(topic="t", partition=0, offset=offset)


def chunk(source: Input, sequence: int, text: str) -> Chunk:
    return Chunk(
        id="i", custom_id=f"request-{source.offset}", choice=0, sequence=sequence, text=text,
        finish_reason=None, input=source, worker="w",
    )  # fmt: skip


def completion(source: Input, text: str | None) -> Completion:
    """An answer; without a text, a failure."""
    about: dict[str, Any] = {
        "id": f"{source.topic}-{source.partition}-{source.offset}",
        "custom_id": f"request-{source.offset}",
    }
    about |= {"tenant": "t", "input": source, "worker": "w"}
    if text is None:
        return Completion(**about, response=None, error=Failed(code="CONTEXT_EXCEEDED", message="too long"))
    usage = Usage(
        prompt_tokens=3, completion_tokens=4, total_tokens=7,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=1),
        completion_tokens_details=CompletionTokensDetails(accepted_prediction_tokens=0, rejected_prediction_tokens=0),
    )  # fmt: skip
    choice = ChatChoice(index=0, message=AssistantMessage(content=text), finish_reason="stop")
    body = ChatResult(id="i", created=0, model="m", choices=[choice], usage=usage, service_tier="default")
    return Completion(
        **about,
        response=Response(status_code=200, request_id="i", body=body),
        error=None,
        bill=Bill(price="0.000000000001", cost="0.000000000002", price_book="b"),
        timing=Timing(queue_time_ms=1, time_to_first_token_ms=2, generation_time_ms=3),
    )


def checkpoint(folder: Path) -> Path:
    """Two tensors of bf16, as their header says, and a config."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"architectures": ["MixtralForCausalLM"], "hidden_size": 2}')
    header = json.dumps(
        {
            "__metadata__": {"format": "pt"},
            "a": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]},
            "b": {"dtype": "BF16", "shape": [2], "data_offsets": [8, 12]},
        }
    ).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    return folder
