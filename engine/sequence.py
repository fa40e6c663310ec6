"""A sequence and its share of a step: the two values that the whole engine core speaks in.

Owns what is known of one choice of a request: its tokens, how many of them are computed, its block table, its counts.
Never decides what runs (`scheduler.py`) or which block is whose (`blocks.py`). Made at submit, dropped when finished.
What every step makes anew for every sequence is a struct: a frozen dataclass takes ten times as long to make. Nor are
`min` and `max` called there: that takes five times as long as to compare.
"""

from array import array
from dataclasses import dataclass, field
from functools import partial

from msgspec import Struct

from engine.steering import Steering, steering_of
from engine.types import FinishReason, Logprob, Progress, Request, Sampling, Usage

Rank = tuple[int, int, int]
TokenLogprobs = tuple[Logprob, tuple[Logprob, ...]]  # the token's own, and those of the likeliest

# A long context has hundreds of blocks, which go into every step's tensors: numbers of 64 bits in one piece of memory.
block_table = partial(array, "q")


@dataclass(eq=False, slots=True, weakref_slot=True)  # drafters know things of a sequence while it lives
class Sequence:
    """One choice of a request while the engine runs it.

    `tokens` (the prompt, then every accepted token) followed by `drafts` is what *should* be computed; the first
    `num_computed` of them *are*. All that the engine does for a sequence is to make the second catch up with the first.
    """

    request: Request
    choice: int
    rank: Rank  # smaller runs first
    length_max: int  # prompt + output: the request's tokens_max or the engine's context_max, whichever ends it first
    leader: "Sequence | None" = None  # the request's first choice that runs: it computes the prompt for all
    is_over: bool = False

    num_prompt: int = field(init=False)  # tokens that it began with
    num_to_score: int = field(init=False)  # leading tokens behind which the prompt's next one shall have its logprobs
    tokens: list[int] = field(init=False)
    steering: Steering | None = field(init=False)  # what the request does to the logits
    drafts: list[int] = field(default_factory=list)  # proposed for the step being planned, empty between steps
    underway: "Share | None" = None  # its share of the newest step that was launched, until that is committed
    num_computed: int = 0  # tokens in the cache now, whether by work or by a shared prefix
    num_reached: int = 0  # the most that num_computed has ever been: work below it is done again

    blocks: "array[int]" = field(default_factory=block_table)  # token p stands in blocks[p // B], place p % B
    block_keys: list[bytes] = field(default_factory=list)  # of leading full blocks of `tokens`, grown when asked for
    num_remembered: int = 0  # leading blocks that the prefix cache has been told of

    num_scored: int = 0  # leading tokens behind which the prompt's next one has its logprobs
    num_cached: int = 0  # prompt tokens that never had to be computed
    num_drafted: int = 0
    num_accepted: int = 0
    num_recomputed: int = 0
    num_preemptions: int = 0

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        self.num_prompt = len(self.tokens)
        is_scored = self.request.sampling.num_prompt_logprobs is not None and self.choice == 0  # of one choice alone
        self.num_to_score = self.num_prompt - 1 if is_scored else 0
        self.steering = steering_of(self.request)
        if self.request.progress and (progress := self.request.progress[self.choice]).tokens:
            self._take_up(progress)

    @property
    def num_output(self) -> int:
        """Tokens accepted so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_reusable(self) -> int:
        """Leading tokens that need not be computed if they are cached: a successor or a logprob comes of work."""
        return self.num_scored if self.num_scored < self.num_to_score else len(self.tokens) - 1

    @property
    def is_awaiting(self) -> bool:
        """The step underway samples its next token: the device will have it before the host knows it."""
        return self.underway is not None and self.underway.num_rows > 0

    @property
    def length(self) -> int:
        """Its tokens, with the one that it is awaiting."""
        return len(self.tokens) + self.is_awaiting if self.underway else len(self.tokens)

    @property
    def num_begun(self) -> int:
        """Tokens that whatever is launched next finds in the cache."""
        return self.underway.stop if self.underway else self.num_computed

    @property
    def num_pending(self) -> int:
        """Tokens to compute until it has caught up; at least 1, for the last token's successor is what is wanted."""
        return self.length + len(self.drafts) - self.num_begun

    @property
    def is_ending(self) -> bool:
        """The token that it is awaiting is its last, whatever it will be."""
        return self.underway is not None and self.length == self.length_max

    @property
    def is_foreseen(self) -> bool:
        """What it computes next does not hang on a token that the host does not know yet."""
        return not (self.is_awaiting and self.steering) or self.is_ending

    @property
    def is_held(self) -> bool:
        """Its leader is still at the prompt: to start now would compute the same blocks twice."""
        leader = self.leader
        return leader is not None and leader.num_computed < leader.num_prompt and not leader.is_over

    def _take_up(self, progress: Progress) -> None:
        """It stands where it stood in another engine: as one preempted here, it has its tokens and no block."""
        self.tokens += progress.tokens
        self.num_reached = len(self.tokens) - 1  # its newest token was never computed
        self.num_scored = self.num_to_score
        self.num_cached = progress.usage.num_cached
        self.num_drafted = progress.usage.num_drafted
        self.num_accepted = progress.usage.num_accepted
        self.num_recomputed = progress.usage.num_recomputed
        self.num_preemptions = progress.usage.num_preemptions

    def share(self, budget: int, first_logits: int = 0) -> "Share":
        """The next `budget` pending tokens, or all of them. `first_logits`: how many rows of logits come before its."""
        if not self.underway and not self.drafts and self.num_computed == len(self.tokens) - 1:
            # A decode, as most are: what is below says the same in twice the time.
            return Share(self, self.num_computed, self.tokens[-1:], 1, first_logits)
        start, length = self.num_begun, self.length
        stop = min(length + len(self.drafts), start + budget)
        if self.underway and self.underway.num_rows:
            tokens = [~self.underway.first_logits]
        else:
            tokens = self.tokens[start:stop]
            if self.drafts:
                tokens += self.drafts[: stop - start - len(tokens)]
        num_rows = stop - length + 1 if stop >= length else 0
        is_scoring = self.num_scored < self.num_to_score
        num_scored = max(0, min(stop, self.num_to_score) - max(start, self.num_scored)) if is_scoring else 0
        return Share(self, start, tokens, num_rows, first_logits, num_scored)

    def ending(self, tokens: list[int]) -> tuple[int, FinishReason | None]:
        """How many of the tokens to append, and the reason if the last of them ends the sequence."""
        num_left = self.length_max - len(self.tokens)
        num_complete = self.steering.num_complete(self.tokens, tokens) if self.steering else None
        stops = self.request.sampling.stop_token_ids
        for num_kept, token in enumerate(tokens[:num_left], 1) if stops or num_complete else ():
            if num_kept == num_complete or token in stops:
                return num_kept, FinishReason.STOP
        return (num_left, FinishReason.LENGTH) if len(tokens) >= num_left else (len(tokens), None)

    def grow(self, share: "Share", brought: "Accepted", num_kept: int) -> None:
        """Its share has been computed, and the first `num_kept` of the tokens that it brought are its own."""
        if self.underway is share:
            self.underway = None
        if share.start < self.num_reached:
            self.num_recomputed += share.num_again
        if brought.scores:
            self.num_scored += len(brought.scores)
        self.tokens += brought.tokens[:num_kept]
        if self.drafts:
            self.drafts = []
        # The newest token is never computed yet. What rejected drafts left in the cache is overwritten by what follows.
        num_computed, num_known = share.start + len(share.tokens), len(self.tokens) - 1
        self.reach(num_computed if num_computed < num_known else num_known)  # noqa: FURB136

    def reach(self, num_computed: int) -> None:
        """The first `num_computed` tokens are in the cache; whatever stands behind them there counts for nothing."""
        self.num_computed = num_computed
        if num_computed > self.num_reached:  # noqa: PLR1730
            self.num_reached = num_computed

    def usage(self) -> Usage:
        """Its counts so far."""
        return Usage(
            num_prompt=self.num_prompt,
            num_cached=self.num_cached,
            num_output=self.num_output,
            num_drafted=self.num_drafted,
            num_accepted=self.num_accepted,
            num_recomputed=self.num_recomputed,
            num_preemptions=self.num_preemptions,
        )


class Share(Struct, frozen=True, eq=False):
    """A sequence's share of one step: compute `tokens`, which stand at `start` and after.

    The last `num_rows` of them are those whose successor is not known, so that a token is sampled behind each: none
    amid a prompt, one when the sequence catches up, one more for each draft. A token that only the device knows stands
    there as ~r: it was sampled from row r of the logits of the step before.
    """

    sequence: Sequence
    start: int
    tokens: list[int]
    num_rows: int
    first_logits: int = 0  # which of the step's sampled rows of logits is the first of its own
    num_scored: int = 0  # tokens before those, behind which the prompt's next one has its logprobs

    @property
    def stop(self) -> int:
        """The position behind its last token."""
        return self.start + len(self.tokens)

    @property
    def num_again(self) -> int:
        """Tokens that had been computed before; ask before the sequence grows."""
        return max(0, min(self.stop, self.sequence.num_reached) - self.start)

    @property
    def first_row(self) -> int:
        """Position of the first token behind which one is sampled."""
        return self.stop - self.num_rows

    @property
    def scored_tokens(self) -> tuple[int, ...]:
        """The prompt's tokens whose logprobs it brings."""
        return self.sequence.request.prompt[self.first_row - self.num_scored + 1 : self.first_row + 1]

    @property
    def num_drafts(self) -> int:
        """How many of its tokens are on trial."""
        return self.num_rows - 1 if self.num_rows else 0

    @property
    def drafts(self) -> list[int]:
        """Those of its tokens that are on trial."""
        return self.tokens[len(self.tokens) - self.num_drafts :]


class Accepted(Struct, frozen=True):
    """What a share brought: the tokens to append, none amid a prompt. With `error` set the sequence cannot go on."""

    tokens: list[int] = []
    logprobs: list[TokenLogprobs] | None = None  # one for each token, where asked for
    scores: list[TokenLogprobs] = []  # of the prompt's tokens
    error: str = ""


@dataclass(frozen=True, slots=True)
class Proposed:
    """Drafts for sequences of one step, and the work that a model had with them."""

    drafts: dict[Sequence, list[int]] = field(default_factory=dict)
    nums_computed: dict[Sequence, int] = field(default_factory=dict)  # tokens, in passes of that model
    num_passes: int = 0


def nobodys(length: int, blocks: list[int]) -> Sequence:
    """A sequence that nobody asked for, with a prompt of zeros in these blocks: to compute for computing's own sake."""
    request = Request(id=-1, prompt=(0,) * length, sampling=Sampling(tokens_max=1))
    sequence = Sequence(request=request, choice=0, rank=(0, 0, 0), length_max=length + 1)
    sequence.blocks = block_table(blocks)
    return sequence
