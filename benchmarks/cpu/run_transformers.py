"""transformers' generate() as a contender: `python -m benchmarks.cpu.run_transformers FOLDER`.

Batches of up to sixteen in the load's order, padded on the left, each as long as its longest request: it has no other.
"""

import sys

import torch
import transformers

from benchmarks.cpu.contender import Play, Run, serve
from benchmarks.cpu.loads import Load

BATCH_MAX = 16


class Watch:
    """A streamer: hears of one sequence's tokens, the first of which are the prompt."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:  # noqa: ARG002
        """As transformers calls it."""
        if not self._is_prompt:
            self._run.first_token()
        self._is_prompt = False

    def end(self) -> None:
        """As transformers calls it."""


def start(folder: str) -> tuple[str, Play]:
    """The model in bf16."""
    torch.set_grad_enabled(False)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="sdpa", experts_implementation="grouped_mm"
    ).eval()

    def play(load: Load, run: Run) -> None:
        for first in range(0, len(load), BATCH_MAX):
            batch = load[first : first + BATCH_MAX]
            length = max(len(prompt) for prompt, _ in batch)
            num_tokens = max(num_tokens for _, num_tokens in batch)
            tokens = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt, _ in batch])
            mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt, _ in batch])
            model.generate(
                tokens,
                attention_mask=mask,
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
                pad_token_id=0,
                streamer=Watch(run) if len(batch) == 1 else None,  # it can watch no more than one
            )
        run.num_tokens = sum(num_tokens for _, num_tokens in load)

    return f"transformers {transformers.__version__}, torch {torch.__version__}", play


if __name__ == "__main__":
    serve(lambda: start(*sys.argv[1:]))
