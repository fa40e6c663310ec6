"""The engine's settings, its limits on what may be asked of it, and how large its cache may be.

Owns numbers and their validation. Where they come from (flags, files, environment) is the worker's affair.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.errors import EngineMisconfigured, RequestRefused
from engine.ranks import RANKS_MAX
from engine.types import Capacity, Request

DRAFTS_MAX = 8  # where text repeats itself more would be kept, but a step with many sequences would grow tenfold
CHOICES_MAX = 128  # OpenAI's own limit for n; each choice is a sequence with host memory of its own
LOGPROBS_MAX = 20  # OpenAI's own limit for top_logprobs; the events of a step grow with it
STOP_TOKENS_MAX = 64  # each is looked at for every row of a sequence below tokens_min
BIASES_MAX = 300  # OpenAI's own limit for logit_bias; each is sent to the device for every row of its sequence
PENALTY_MAX = 2.0  # OpenAI's own range for both of its penalties, from minus this
REPETITION_MIN, REPETITION_MAX = 0.1, 10.0  # far beyond use (1.0 to 1.5), and a logit stays far from infinity
BIAS_MAX = 100.0  # OpenAI's own range for a bias, from minus this: enough to forbid a token, or to force it
EXPERTS = ("sharded", "whole")
INTEGER_BITS = 64  # ids and seeds are integers of the wire

SHARE_ON_HOST = 0.5  # the rest is for activations and for whoever else lives here
SHARE_ON_GPU = 0.9  # activations are measured and the device is ours alone: the rest is for what nobody foresaw

Switch = Literal["auto", "on", "off"]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the engine uses the machine. Raises EngineMisconfigured where the numbers cannot work together."""

    device: str = "cpu"
    weights: str = "auto"  # of engine/quant FORMATS, or auto: as the checkpoint has them, its floats as activations
    cache: str = "auto"  # of kernels/cache.py CACHE_DTYPES, or auto: as activations
    threads: int = 0  # processor threads of a rank's tensor work; 0: all cores, shared among the ranks
    ranks: int = 1  # processes that compute the model together, each on a GPU of its own, or on a share of the cores
    experts: str = "sharded"  # of several ranks: each has a part of every expert, or some experts "whole"

    block_size: int = 16  # vLLM's too: prefixes are shared in whole blocks, and a sequence wastes half of one
    cache_tokens: int = 0  # 0: as `cache_memory_share` of the free memory allows
    cache_memory_share: float = 0.0  # of the free memory; 0: SHARE_ON_HOST, or SHARE_ON_GPU of what a step leaves

    context_max: int = 0  # prompt + output of one sequence; 0: as the model and the cache allow
    tokens_per_step_max: int = 512  # a prompt's chunk: the longest that a running sequence waits for its next token
    sequences_max: int = 32  # running at once
    drafts_max: int | None = None  # proposed for a sequence in one step, if they pay; None: DRAFTS_MAX on a CPU, or 0
    draft_experts: int = 0  # the model drafts for itself with so many experts for each token; 0: it does not
    draft_heads: bool = False  # the model's own layer for multi-token prediction drafts, and needs room for states
    draft_model: Path | None = None  # the folder of one that drafts; without any, drafts are looked up in the text
    draft_weights: str = "auto"  # as `weights`, of the draft model
    overlap: Switch = "auto"  # a step is planned while the one before runs; auto: on a GPU, without drafts
    graphs: Literal["auto", "off"] = "auto"  # decodes are recorded once and replayed; auto: where there is CUDA
    draft_cost: float | None = None  # of one more token for every sequence, as a share of a step; None: as measured
    ageing: int = 64  # later requests that may go before one whose priority number is higher by 1

    def __post_init__(self) -> None:
        for name, low in _LOWEST.items():
            if (number := getattr(self, name)) is not None and number < low:
                raise EngineMisconfigured(f"{name} is {getattr(self, name)}; it must be {low} or more")
        if not 0 <= self.cache_memory_share < 1:
            raise EngineMisconfigured(
                f"cache_memory_share is {self.cache_memory_share}; it must be below 1, or 0 to have it chosen"
            )
        if self.cache_tokens % self.block_size:
            raise EngineMisconfigured(
                f"cache_tokens is {self.cache_tokens}, not a multiple of block_size {self.block_size}; "
                f"take {-(-self.cache_tokens // self.block_size) * self.block_size}"
            )
        if self.overlap == "on" and (self.drafts_max or self.has_drafting_model):
            raise EngineMisconfigured(
                "overlap is on and drafts_max is not 0, or a model drafts: drafts continue tokens that a step ahead "
                "does not know yet; set drafts_max to 0 and no drafting model, or leave overlap to be chosen"
            )
        self._check_ranks()
        if self.drafts_max == 0 and self.has_drafting_model:
            raise EngineMisconfigured(
                f"{' and '.join(self._drafting)} is set and drafts_max is 0: nothing would be drafted"
            )
        if len(self._drafting) > 1:
            raise EngineMisconfigured(f"{' and '.join(self._drafting)} are set; only one of them can draft")
        if self.sequences_max > self.tokens_per_step_max:
            raise EngineMisconfigured(
                f"tokens_per_step_max is {self.tokens_per_step_max}, too few for {self.sequences_max} sequences; "
                "raise it, or lower sequences_max"
            )

    def _check_ranks(self) -> None:
        if self.ranks > RANKS_MAX:
            raise EngineMisconfigured(f"ranks is {self.ranks}; it must be {RANKS_MAX} or less")
        if self.experts not in EXPERTS:
            raise EngineMisconfigured(f"experts {self.experts!r} is not one of {', '.join(EXPERTS)}")
        if self.ranks > 1 and self.has_drafting_model:
            raise EngineMisconfigured(
                f"{' and '.join(self._drafting)} is set, and ranks is {self.ranks}: a model drafts for one rank only; "
                "unset it, and drafts are looked up"
            )

    @property
    def has_drafting_model(self) -> bool:
        """Whether drafts come from a model, and are not looked up."""
        return bool(self._drafting)

    @property
    def _drafting(self) -> list[str]:
        """The settings by which a model drafts."""
        return [name for name in ("draft_experts", "draft_heads", "draft_model") if getattr(self, name)]


_LOWEST = {
    "threads": 0,
    "ranks": 1,
    "block_size": 1,
    "cache_tokens": 0,
    "context_max": 0,
    "tokens_per_step_max": 1,
    "sequences_max": 1,
    "drafts_max": 0,
    "draft_experts": 0,
    "draft_cost": 0,
    "ageing": 0,
}


def num_blocks_within(memory_bytes: int, bytes_per_block: int) -> int:
    """As many blocks as fit into the memory. Raises EngineMisconfigured where not even one does."""
    if memory_bytes < bytes_per_block:
        raise EngineMisconfigured(
            f"{memory_bytes} bytes are left for the cache, and one block takes {bytes_per_block}; "
            "use a smaller model or weight format, or set cache_tokens"
        )
    return memory_bytes // bytes_per_block


def check_request(request: Request, capacity: Capacity) -> None:
    """Raise RequestRefused if the engine could never run the request, with what it could. Any thread may ask."""
    for holds, text in _demands(request, capacity):
        if not holds:
            raise RequestRefused(text)


def _demands(request: Request, capacity: Capacity) -> list[tuple[bool, str]]:
    prompt, sampling = request.prompt, request.sampling
    vocabulary = range(capacity.vocab_size)
    seeds = range(-(1 << INTEGER_BITS - 1), 1 << INTEGER_BITS)
    # NaN lies within no range, so the comparisons refuse it too.
    return [
        (len(prompt) > 0, "the prompt has no tokens"),
        (
            len(prompt) < capacity.context_max,
            f"the prompt has {len(prompt)} tokens; it must leave room for one more within {capacity.context_max}",
        ),
        (all(token in vocabulary for token in prompt), f"a prompt token is not within 0 .. {capacity.vocab_size - 1}"),
        (sampling.tokens_max >= 1, f"tokens_max is {sampling.tokens_max}; it must be 1 or more"),
        (
            0 <= sampling.tokens_min <= sampling.tokens_max,
            f"tokens_min is {sampling.tokens_min}; it must be within 0 .. tokens_max ({sampling.tokens_max})",
        ),
        (0 <= sampling.temperature < float("inf"), f"temperature {sampling.temperature} is not a number from 0 up"),
        (sampling.top_k >= 0, f"top_k is {sampling.top_k}; it must be 0 (all) or more"),
        (0 < sampling.top_p <= 1, f"top_p is {sampling.top_p}; it must be above 0 and at most 1"),
        (0 <= sampling.min_p <= 1, f"min_p is {sampling.min_p}; it must be within 0 .. 1"),
        (
            abs(sampling.frequency_penalty) <= PENALTY_MAX,
            f"frequency_penalty is {sampling.frequency_penalty}; it must be within -{PENALTY_MAX} .. {PENALTY_MAX}",
        ),
        (
            abs(sampling.presence_penalty) <= PENALTY_MAX,
            f"presence_penalty is {sampling.presence_penalty}; it must be within -{PENALTY_MAX} .. {PENALTY_MAX}",
        ),
        (
            REPETITION_MIN <= sampling.repetition_penalty <= REPETITION_MAX,
            f"repetition_penalty {sampling.repetition_penalty} is not within {REPETITION_MIN} .. {REPETITION_MAX}",
        ),
        (
            len(sampling.logit_bias) == len(dict(sampling.logit_bias)) <= BIASES_MAX,
            f"logit_bias has more than {BIASES_MAX} entries, or a token twice",
        ),
        (
            all(token in vocabulary for token, _ in sampling.logit_bias),
            f"a token of logit_bias is not within 0 .. {capacity.vocab_size - 1}",
        ),
        (
            all(abs(bias) <= BIAS_MAX for _, bias in sampling.logit_bias),
            f"a value of logit_bias is not within -{BIAS_MAX} .. {BIAS_MAX}",
        ),
        (sampling.seed in seeds, f"the seed does not fit {INTEGER_BITS} bits"),
        (
            1 <= sampling.num_choices <= CHOICES_MAX,
            f"num_choices is {sampling.num_choices}; it must be within 1 .. {CHOICES_MAX}",
        ),
        (
            sampling.num_logprobs is None or 0 <= sampling.num_logprobs <= min(LOGPROBS_MAX, capacity.vocab_size),
            f"num_logprobs is {sampling.num_logprobs}; it must be within 0 .. {LOGPROBS_MAX}",
        ),
        (
            sampling.num_prompt_logprobs is None
            or 0 <= sampling.num_prompt_logprobs <= min(LOGPROBS_MAX, capacity.vocab_size),
            f"num_prompt_logprobs is {sampling.num_prompt_logprobs}; it must be within 0 .. {LOGPROBS_MAX}",
        ),
        (len(sampling.stop_token_ids) <= STOP_TOKENS_MAX, f"there are more than {STOP_TOKENS_MAX} stop tokens"),
        (
            all(token in vocabulary for token in sampling.stop_token_ids),
            f"a stop token is not within 0 .. {capacity.vocab_size - 1}",
        ),
        *(_demands_of_progress(request, capacity) if request.progress else ()),
    ]


def _demands_of_progress(request: Request, capacity: Capacity) -> list[tuple[bool, str]]:
    progress, sampling = request.progress, request.sampling
    length_max = min(sampling.tokens_max, capacity.context_max - len(request.prompt))
    vocabulary = range(capacity.vocab_size)
    return [
        (
            len(progress) == sampling.num_choices,
            f"there is progress of {len(progress)} choices; there are {sampling.num_choices}",
        ),
        (not all(choice.is_over for choice in progress), "every choice is over: nothing is left to run"),
        (
            all(choice.is_over or len(choice.tokens) < length_max for choice in progress),
            f"a choice that is not over has {length_max} tokens or more, as many as it may have",
        ),
        (
            all(token in vocabulary for choice in progress for token in choice.tokens),
            f"a token of progress is not within 0 .. {capacity.vocab_size - 1}",
        ),
    ]
