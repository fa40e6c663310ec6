"""What the engine computes next. One rule decides it all:

    A sequence has tokens that should be computed and tokens that are. Each step hands out a budget of tokens so that
    the second catch up with the first.

There is no prefill phase and no decode phase. A new prompt is many tokens behind and catches up in one share or in
several (chunked prefill). A sequence that has caught up samples a token and so is one behind again (decode). A cached
prefix is a head start. A preempted sequence has computed nothing again. Drafts are tokens that should be computed, on
trial. The runner does not know these words, and below they only name what the rule brings about.

Owns the order: who runs, who waits, who gives way. Never touches a tensor, a clock or another thread. Requests come
from `core.py`, plans go to the runner, what they brought comes back through `commit`.
"""

from bisect import insort
from collections import Counter
from dataclasses import dataclass, field
from operator import attrgetter

from engine.blocks import BlockCache
from engine.config import EngineConfig
from engine.errors import RequestRefused
from engine.metering import drafting_of, work_in_vain, work_of
from engine.sequence import Accepted, Proposed, Sequence, Share
from engine.types import EngineStats, Finished, FinishReason, Request, Scored, StepResult, Token

_by_rank = attrgetter("rank")

SCORES_PER_STEP_MAX = 128  # rows of logits for prompts' logprobs: 80 MB with a vocabulary of 152,000


@dataclass
class Plan:
    """What one step computes: each sequence at most once, the more urgent first."""

    budget: int  # tokens that may still be added
    shares: list[Share] = field(default_factory=list)
    num_rows: int = 0  # of logits that tokens are sampled from
    scores_left: int = SCORES_PER_STEP_MAX
    proposed: Proposed = field(default_factory=Proposed)
    drafting_ns: int = 0  # that proposing took

    def add(self, sequence: Sequence) -> None:
        """As much of the sequence's pending tokens as the budget allows is part of the step."""
        is_scoring = sequence.num_to_score and sequence.num_begun < sequence.num_to_score
        num_max = min(self.budget, self.scores_left) if is_scoring else self.budget
        if num_max:
            self._add(sequence, num_max)

    def propose(self, proposed: Proposed) -> None:
        """Drafts for sequences that have nothing pending in the plan but their newest token; the budget has them.

        Not for a plan behind a step that is underway: a draft continues tokens that are known.
        """
        self.proposed = proposed
        shares, self.shares, self.num_rows = self.shares, [], 0
        for share in shares:
            share.sequence.underway = None
            share.sequence.drafts = proposed.drafts.get(share.sequence, [])
            self.budget += len(share.tokens)
            self.scores_left += share.num_scored
            self._add(share.sequence, len(share.tokens) + len(share.sequence.drafts))

    def _add(self, sequence: Sequence, num_max: int) -> None:
        share = sequence.share(num_max, self.num_rows)
        self.budget -= len(share.tokens)
        self.num_rows += share.num_rows
        self.scores_left -= share.num_scored
        self.shares.append(share)
        sequence.underway = share


class Scheduler:
    """All sequences that the engine has, and the order among them. One thread's."""

    def __init__(self, config: EngineConfig, blocks: BlockCache, context_max: int) -> None:
        self._config = config
        self._blocks = blocks
        self._context_max = context_max
        self._running: list[Sequence] = []  # by rank; they hold blocks
        self._waiting: list[Sequence] = []  # by rank; they hold none
        self._num_submitted = 0
        self._result = StepResult()  # gathers until the step's end
        self._totals: Counter[str] = Counter()  # by the names of EngineStats

    @property
    def sequences(self) -> list[Sequence]:
        """All that are not over."""
        return self._running + self._waiting

    @property
    def has_work(self) -> bool:
        """Something to plan, or something finished that nobody has been told of."""
        return bool(self._running or self._waiting or self._result.finished)

    def submit(self, request: Request) -> None:
        """Each choice of the request waits for its turn. Raises RequestRefused where the id is in use."""
        if any(sequence.request.id == request.id for sequence in self.sequences):
            raise RequestRefused(f"request {request.id} is not over; an id may be used again once all choices finished")
        self._num_submitted += 1
        # Ageing in arrivals, not seconds: for each step of priority at most `ageing` later requests go first, so that
        # nothing starves, and the order is the same at every run.
        turn = self._num_submitted + request.priority * self._config.ageing
        leader: Sequence | None = None
        for choice in range(request.sampling.num_choices):
            if request.progress and request.progress[choice].is_over:
                continue
            sequence = Sequence(
                request=request,
                choice=choice,
                rank=(turn, request.priority, choice),
                length_max=min(len(request.prompt) + request.sampling.tokens_max, self._context_max),
                leader=leader,
            )
            leader = leader or sequence
            insort(self._waiting, sequence, key=_by_rank)

    def cancel(self, request_id: int, choice: int | None = None) -> None:
        """No choice of the request, or not the one named, runs on; what did finishes as stopped.

        An unknown id is passed over: the request may have finished while the caller made up its mind.
        """
        for sequence in self.sequences:
            if sequence.request.id == request_id and choice in (None, sequence.choice):
                self._finish(sequence, FinishReason.STOP)

    def interrupt(self) -> None:
        """Nothing runs on: every sequence finishes as interrupted, with its counts so far."""
        for sequence in self.sequences:
            self._finish(sequence, FinishReason.INTERRUPTED)

    def plan(self) -> Plan:
        """Hand out the step's tokens: running sequences first, then waiting ones, each in order of rank."""
        plan = Plan(self._config.tokens_per_step_max)
        # Preemption takes from the list's end while we walk it: a sequence given up is one we have not come to.
        for sequence in self._running:
            if plan.budget and not sequence.is_ending and self._make_room(sequence):
                plan.add(sequence)
        if len(self._running) == self._config.sequences_max:
            return plan  # whoever waits need not be looked at: there may be many
        for sequence in [sequence for sequence in self._waiting if not sequence.is_held]:
            # Strictly in order: if a small one went ahead of a large one that lacks room, the large one would starve.
            if not plan.budget or not self._admit(sequence):
                break
            plan.add(sequence)
        return plan

    def plan_ahead(self) -> Plan:
        """The step behind the one that is underway, whose tokens are not known yet; empty where it must wait for them.

        It must if a sequence cannot go on unseen, or if one would have to give way: the device still writes to its
        blocks. A sequence whose unknown token turns out to be its last computes in vain.
        """
        for sequence in self._running:
            if not sequence.is_foreseen or not self._blocks.extend(sequence, sequence.length):
                return Plan(0)
        return self.plan()

    def commit(self, plan: Plan, accepted: list[Accepted]) -> StepResult:
        """The plan has been computed and brought these tokens: sequences have grown, and some are over.

        What comes back tells of all that has changed since the last commit; how long it took is the meter's to say.
        """
        for share, brought in zip(plan.shares, accepted, strict=True):
            self._commit(share, brought)
        self._result.charges += drafting_of(plan.proposed)
        self._totals["num_steps"] += 1 if plan.shares else 0
        result, self._result = self._result, StepResult()
        return result

    def stats(self) -> EngineStats:
        """Counts since the start, and how full the engine is now."""
        return EngineStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            blocks_used=self._blocks.num_held,
            blocks_total=self._blocks.num_blocks,
            **self._totals,
        )

    def _make_room(self, sequence: Sequence) -> bool:
        """A running sequence holds blocks for what it should compute, if need be those of the lowest-ranked one."""
        while not self._blocks.extend(sequence, sequence.length):
            lowest = self._running[-1]
            if lowest is sequence:
                # It keeps its blocks and sits out the step: those above it need no work redone, and may finish.
                return False
            self._preempt(lowest)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """The sequence gives up its blocks and waits; what it had computed it computes again, or finds still cached."""
        self._blocks.release(sequence)
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        self._totals["num_preemptions"] += 1
        self._running.remove(sequence)
        insort(self._waiting, sequence, key=_by_rank)

    def _admit(self, sequence: Sequence) -> bool:
        """A waiting sequence runs, with its cached prefix and blocks for all its tokens; or there is no room yet."""
        if len(self._running) == self._config.sequences_max:
            return False
        # A spare block for each that runs: a newcomer who makes the others run out at once would only be preempted.
        num_cached = self._blocks.claim(sequence, spare=len(self._running))
        if num_cached is None:
            return False
        # A prompt token is saved if it was never computed; other hits are less of a preempted one's work to redo.
        num_saved = max(0, min(num_cached, sequence.num_prompt) - sequence.num_reached)
        sequence.num_cached += num_saved
        self._totals["prefix_hit_tokens"] += num_saved
        self._totals["prompt_tokens"] += 0 if sequence.num_reached else sequence.num_prompt
        sequence.reach(num_cached)
        self._waiting.remove(sequence)
        insort(self._running, sequence, key=_by_rank)
        return True

    def _commit(self, share: Share, brought: Accepted) -> None:
        """One sequence has what its share brought, up to where it ends."""
        sequence, result = share.sequence, self._result
        if sequence.is_over:
            result.charges.append(work_in_vain(share))
            return
        num_kept, reason = (0, FinishReason.FAILED) if brought.error else sequence.ending(brought.tokens)
        result.charges += work_of(share, num_kept)
        if share.num_rows > 1:
            self._count_drafts(share, num_kept)
        if brought.scores:
            result.scored.append(Scored(request=sequence.request.id, logprobs=brought.scores))
        self._tell(sequence, brought, num_kept)
        sequence.grow(share, brought, num_kept)
        self._blocks.remember(sequence)
        if reason:
            self._finish(sequence, reason, brought.error)

    def _count_drafts(self, share: Share, num_kept: int) -> None:
        """Drafts were tried, and so many tokens kept: the drafts that were right, and the one behind them."""
        sequence, num_drafted, num_accepted = share.sequence, share.num_drafts, max(0, num_kept - 1)
        sequence.num_drafted += num_drafted
        sequence.num_accepted += num_accepted
        self._totals["num_drafted"] += num_drafted
        self._totals["num_accepted"] += num_accepted

    def _tell(self, sequence: Sequence, brought: Accepted, num_tokens: int) -> None:
        """The worker shall hear of the first `num_tokens` tokens, which the sequence does not have yet."""
        request, choice, num_output = sequence.request.id, sequence.choice, sequence.num_output
        for place, token in enumerate(brought.tokens[:num_tokens]):
            logprob, likeliest = brought.logprobs[place] if brought.logprobs else (None, ())
            self._result.tokens.append(
                Token(
                    request=request,
                    choice=choice,
                    index=num_output + place,
                    token=token,
                    logprob=logprob,
                    top_logprobs=likeliest,
                )
            )

    def _finish(self, sequence: Sequence, reason: FinishReason, error: str = "") -> None:
        """The sequence is gone, wherever it stood; the step's end tells."""
        (self._running if sequence.blocks else self._waiting).remove(sequence)
        if error:
            self._blocks.forget(sequence)
        self._blocks.release(sequence)
        sequence.is_over = True
        self._result.finished.append(
            Finished(
                request=sequence.request.id,
                choice=sequence.choice,
                reason=reason,
                usage=sequence.usage(),
                error=error,
            )
        )
