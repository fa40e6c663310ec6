"""Our engine as a contender: `python -m benchmarks.cpu.run_tokenmill FOLDER WEIGHTS`."""

import sys
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.cpu.contender import Play, Run, serve
from benchmarks.cpu.loads import Load
from engine.build import build
from engine.config import EngineConfig
from engine.types import Request, Sampling
from kernels.backends import pick

CACHE_TOKENS = 16 * 1024  # C has 12,928 tokens in all


def start(folder: str, weights: str) -> tuple[str, Play]:
    """The engine alone: no Kafka, no text."""
    config = EngineConfig(
        weights=weights,
        cache="bf16",  # as the other engines' caches, bf16 or fp16
        cache_tokens=CACHE_TOKENS,
        sequences_max=64,
        drafts_max=0,  # random weights repeat themselves as no text does, and the other engines draft nothing
    )
    core = build(config, Path(folder))
    core.meter.start()
    ids = iter(range(sys.maxsize))

    def play(load: Load, run: Run) -> None:
        salt = str(run.began_s)  # nothing is left of an earlier pass: the other engines' prefix caches are off
        for prompt, num_tokens in load:
            sampling = Sampling(temperature=0.0, tokens_max=num_tokens, tokens_min=num_tokens)
            core.submit(Request(id=next(ids), prompt=tuple(prompt), sampling=sampling, cache_salt=salt))
        while core.has_work:
            result = core.step()
            if result.tokens:
                run.first_token()
            run.num_tokens += len(result.tokens)

    return f"tokenmill {version('tokenmill')} ({pick('cpu').name}), torch {torch.__version__}", play


if __name__ == "__main__":
    serve(lambda: start(*sys.argv[1:]))
