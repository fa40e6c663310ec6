"""llama.cpp's server as a contender: `python -m benchmarks.cpu.run_llamacpp SERVER FILE VERSION`."""

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from benchmarks.cpu.contender import Play, Run, serve
from benchmarks.cpu.loads import Load, Prompt

SLOTS = 16  # sequences at once; more were slower on two cores
CONTEXT = 1024  # tokens of each
START_S_MAX = 120.0


class Server:
    """A llama-server on a free port of this machine, until `stop`."""

    def __init__(self, program: str, model: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        flags = {
            "-m": model,
            "--host": "127.0.0.1",
            "--port": self._port,
            "-t": len(os.sched_getaffinity(0)),
            "-np": SLOTS,
            "-c": SLOTS * CONTEXT,
            "-b": 2048,
            "-ub": 512,
            "--cache-ram": 0,
        }
        words = [str(word) for flag in flags.items() for word in flag]
        self._process = subprocess.Popen([program, *words, "--no-warmup", "--no-cache-prompt"], stdout=sys.stderr)
        end_s = time.monotonic() + START_S_MAX
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > end_s:
                raise SystemExit("llama-server did not start")
            time.sleep(0.2)

    def _is_ready(self) -> bool:
        try:
            return self._call("GET", "/health").status == 200
        except OSError:
            return False

    def _call(self, method: str, path: str, body: Mapping[str, object] | None = None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self._port)
        connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
        return connection.getresponse()

    def generate(self, prompt: Prompt, num_tokens: int, run: Run, *, streamed: bool) -> int:
        """How many tokens came."""
        body = {
            "prompt": prompt,
            "n_predict": num_tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "samplers": ["temperature"],
            "cache_prompt": False,
            "stream": streamed,
        }
        last = b""
        for line in self._call("POST", "/completion", body):
            if line.strip():
                last = line
                if streamed:
                    run.first_token()
        return int(json.loads(last.removeprefix(b"data:"))["tokens_predicted"])

    def play(self, load: Load, run: Run) -> None:
        """All requests at once. The first alone is streamed, to see a first token: sixteen streams cost it a sixth."""
        with ThreadPoolExecutor(len(load)) as pool:
            runs = [
                pool.submit(self.generate, prompt, num_tokens, run, streamed=index == 0)
                for index, (prompt, num_tokens) in enumerate(load)
            ]
        run.num_tokens = sum(one.result() for one in runs)

    def stop(self) -> None:
        """The server is gone."""
        self._process.terminate()
        self._process.wait()


def main(program: str, model: str, version: str) -> None:
    """Plays loads until stdin ends."""
    with ExitStack() as stack:

        def start() -> tuple[str, Play]:
            server = Server(program, model)
            stack.callback(server.stop)
            return version, server.play

        serve(start)


if __name__ == "__main__":
    main(*sys.argv[1:])
