"""Drafts: tokens proposed to follow a sequence, so that one step may accept several.

Owns where drafts come from, how many are worth their work, and which are kept. Never computes: drafts are pending
tokens like any other, and the model's own choice behind each of them decides.

Every position is sampled with that position's own random number whether a draft stands there or not, and a draft is
kept as long as it equals what was sampled. So the output is that of plain decoding, token for token, under greedy and
under seeded sampling alike. Nothing is lost against rejection sampling (Leviathan et al., arXiv 2211.17192): a
proposal with all its probability on one token is kept there with the target's probability p(draft), and here too, for
that is how often the sample equals it.
"""

NGRAM_SIZES = (4, 3, 2)  # longest first: the longer the match, the likelier its sequel; one token matches by chance
RATE_AT_START = 0.5  # expected share of drafts kept before anything is measured
RATE_MEMORY = 0.8  # weight of the past at each verification: a change of text shows within about five
RATE_RECOVERY = 0.02  # drift back towards the start at each step without drafts: some 50 steps until the next attempt


COST_AT_START = 0.3  # between what int8 weights ask for one sequence (0.05) and for eight (0.5)
COST_MEMORY = 0.98  # weight of the past at each step: fifty steps, some seconds
COST_SPREAD_MIN = 0.25  # variance of the tokens of a step, below which their times say nothing of one token more


class DraftCost:
    """What one more token for every sequence costs, as a share of a step without drafts: from the steps' own times.

    A step of T tokens takes a + b T, a straight line through the steps that had no prompts in them, the newer the more
    weight. So S sequences with q drafts each ask for q b S / (a + b S) more, little where the weights' way from memory
    is the time and much where arithmetic is.
    """

    def __init__(self, fixed: float | None) -> None:
        """`fixed`: nothing is measured, this is it."""
        self._fixed = fixed
        self._weight = self._tokens = self._times = self._squares = self._products = 0.0

    def learn(self, num_tokens: int, step_ns: int) -> None:
        """Account for one step."""
        new = (1.0, num_tokens, step_ns, num_tokens**2, num_tokens * step_ns)
        old = (self._weight, self._tokens, self._times, self._squares, self._products)
        self._weight, self._tokens, self._times, self._squares, self._products = (
            COST_MEMORY * past + now for past, now in zip(old, new, strict=True)
        )

    def share(self, num_sequences: int) -> float:
        """The cost of a draft for each of so many sequences; as at the start until steps of several sizes are known."""
        if self._fixed is not None:
            return self._fixed
        if not self._weight:
            return COST_AT_START
        tokens, time = self._tokens / self._weight, self._times / self._weight
        spread = self._squares / self._weight - tokens**2
        if spread < COST_SPREAD_MIN:
            return COST_AT_START
        per_token = max(0.0, (self._products / self._weight - tokens * time) / spread)
        step = max(0.0, time - per_token * tokens) + per_token * num_sequences
        return per_token * num_sequences / step if step else COST_AT_START


class Drafting:
    """One sequence's drafts by prompt lookup: what followed when its last tokens were last seen (Saxena, 2023).

    Their number follows the measured rate at which they are kept, down to none where they lose.
    """

    def __init__(self, drafts_max: int) -> None:
        self._drafts_max = drafts_max
        self._rate = RATE_AT_START
        self._sequels: dict[tuple[int, ...], int] = {}  # n-gram -> the position behind its latest occurrence
        self._num_indexed = 0

    def propose(self, tokens: list[int], num_max: int, cost: float) -> list[int]:
        """At most `num_max` tokens that may follow `tokens`; none where no n-gram repeats or none would pay.

        `cost`: of one token more for every sequence, as a share of the step.
        """
        if not self._drafts_max:
            return []
        num_drafts = min(num_max, self._num_worth(cost))
        if num_drafts <= 0:
            self._rate += RATE_RECOVERY * (RATE_AT_START - self._rate)
            return []
        self._index(tokens)
        for size in NGRAM_SIZES:
            sequel = self._sequels.get(tuple(tokens[-size:]))
            if sequel is not None:
                # A sequel that runs into the end goes on as the loop that it then is.
                period = len(tokens) - sequel
                return [tokens[sequel + place % period] for place in range(num_drafts)]
        return []

    def learn(self, num_drafted: int, num_accepted: int) -> None:
        """Account for one verification of at least one draft."""
        # The drafts behind the first wrong one were never judged.
        num_judged = min(num_drafted, num_accepted + 1)
        self._rate += (1 - RATE_MEMORY) * (num_accepted / num_judged - self._rate)

    def _num_worth(self, cost: float) -> int:
        """How many drafts bring the most tokens for the work; 0 where plain decoding does."""
        best, best_gain = 0, 1.0
        expected, chance = 1.0, 1.0
        for num_drafts in range(1, self._drafts_max + 1):
            chance *= self._rate
            expected += chance  # the step's own token, and each draft that is kept with all before it
            gain = expected / (1 + cost * num_drafts)
            if gain > best_gain:
                best, best_gain = num_drafts, gain
        return best

    def _index(self, tokens: list[int]) -> None:
        """Note the sequel of every n-gram that has one, the newest token being nobody's n-gram yet."""
        for position in range(max(self._num_indexed, min(NGRAM_SIZES)), len(tokens)):
            for size in NGRAM_SIZES:
                if size <= position:
                    self._sequels[tuple(tokens[position - size : position])] = position
        self._num_indexed = len(tokens)


def verify(drafts: list[int], sampled: list[int]) -> list[int]:
    """The sampled tokens up to and with the first that is not as drafted; there is one more than drafted, or none."""
    num_kept = 0
    while num_kept < len(drafts) and drafts[num_kept] == sampled[num_kept]:
        num_kept += 1
    return sampled[: num_kept + 1]
