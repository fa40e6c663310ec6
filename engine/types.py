"""What crosses between the worker and the engine: plain data, once a step.

Owns the structs that both sides know. Nothing here holds a tensor, a Kafka name or an amount of money; moving the
engine to a process of its own would send exactly these, and for a constraint the text that it was made of.
"""

from enum import StrEnum

from msgspec import Struct

from engine.constraint import Constraint


class Sampling(Struct, frozen=True, kw_only=True):
    """How to choose a sequence's tokens. `temperature` 0 is greedy; `top_k` 0 means all."""

    tokens_max: int
    tokens_min: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    frequency_penalty: float = 0.0  # these four are defined in engine/steering.py
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # token ids, none twice, and what is added to their logits
    seed: int = 0  # with the choice and the position it fixes the random number, whatever else is in the batch
    stop_token_ids: tuple[int, ...] = ()
    num_logprobs: int | None = None  # None: no logprobs; 0: the chosen token's alone
    num_prompt_logprobs: int | None = None  # the same of the prompt, which then no cached prefix stands for
    num_choices: int = 1


class Usage(Struct, frozen=True, kw_only=True):
    """Counts of one choice, in tokens. Every prompt token of it is either computed or cached."""

    num_prompt: int
    num_cached: int
    num_output: int
    num_drafted: int = 0
    num_accepted: int = 0
    num_recomputed: int = 0
    num_preemptions: int = 0


class Progress(Struct, frozen=True, kw_only=True):
    """How far one choice has come in another engine: its tokens, and its counts by then."""

    tokens: tuple[int, ...]  # accepted; the next one has the index behind them
    usage: Usage
    is_over: bool = False  # it has ended: nothing is left to run


class Request(Struct, frozen=True, kw_only=True):
    """What the engine is asked. `id` is the caller's handle and comes back with everything that concerns it.

    With `progress`, one entry a choice, it goes on where another engine was interrupted: the next tokens are those that
    would have come there, and the choices' counts are carried on.
    """

    id: int
    prompt: tuple[int, ...]
    sampling: Sampling
    priority: int = 0  # lower runs first
    cache_salt: str = ""  # sequences share cached prefixes only under the same salt
    progress: tuple[Progress, ...] = ()
    constraint: Constraint | None = None  # what each choice must follow; to its end, if it is long enough


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"  # a stop token, the end of its constraint, or the caller cancelled it
    LENGTH = "length"  # tokens_max reached
    FAILED = "failed"  # this sequence alone could not go on
    INTERRUPTED = "interrupted"  # the engine ends before it: another one may go on with its `Progress`


class Logprob(Struct, frozen=True, array_like=True):
    """A token and its natural logarithmic probability under the model (before penalties, bias and temperature)."""

    token: int
    logprob: float


class Token(Struct, frozen=True, kw_only=True):
    """One accepted token of one choice."""

    request: int
    choice: int
    index: int  # place among the choice's output tokens
    token: int
    logprob: Logprob | None = None
    top_logprobs: tuple[Logprob, ...] = ()


class Scored(Struct, frozen=True, kw_only=True):
    """Logprobs of the next prompt tokens, from the second on: the first follows nothing. Before any output token."""

    request: int
    logprobs: list[tuple[Logprob, tuple[Logprob, ...]]]  # the token's own, and those of the likeliest


class Finished(Struct, frozen=True, kw_only=True):
    """A choice is over: its last event."""

    request: int
    choice: int
    reason: FinishReason
    usage: Usage
    error: str = ""  # with FAILED: what went wrong


class Work(StrEnum):
    """What device time was spent on, for one sequence."""

    PROMPT = "prompt"
    OUTPUT = "output"
    REJECTED = "draft_rejected"
    DRAFTED = "drafted"  # by a model: its tokens are not the sequence's, and cost less
    RECOMPUTED = "recomputed"


class Charge(Struct, kw_only=True):
    """Device time that a step spent for one choice. `num_tokens` were computed in it.

    An OUTPUT charge belongs to the output token `index`; a step that accepts several tokens has a charge for each.
    """

    request: int
    choice: int
    work: Work
    num_tokens: int
    device_ns: int = 0  # the meter's to say, at the step's end
    index: int | None = None


class StepResult(Struct, kw_only=True):
    """All that one step changed. `idle_ns` + the sum of `charges` is exactly the time since the step before ended."""

    idle_ns: int = 0
    tokens: list[Token] = []
    finished: list[Finished] = []
    charges: list[Charge] = []
    scored: list[Scored] = []


class Capacity(Struct, frozen=True, kw_only=True):
    """What the engine can hold, in tokens: intake counts its room by it."""

    cache_tokens: int  # places in the block cache
    context_max: int  # prompt + output of one sequence
    vocab_size: int
    eos_token_ids: tuple[int, ...]


class EngineStats(Struct, frozen=True, kw_only=True):
    """A look at the engine between two steps."""

    num_running: int = 0
    num_waiting: int = 0
    blocks_used: int = 0
    blocks_total: int = 0
    num_preemptions: int = 0
    num_steps: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    prefix_hit_tokens: int = 0
    prompt_tokens: int = 0
