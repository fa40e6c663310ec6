"""What is drawn follows the distribution that was asked for: chi-square against the definitions in 64 bits.

The whole sampler is under test: the random number of each place, steering, the table's choice, and drafts. Seeds are
fixed, so a test passes always or never. P_MIN: of 24 tests with honest samplers one in 400 such files would fail, and a
tenth more temperature, a bound of top-p that is one token off or drafts that are kept unasked give less than 1e-13.
"""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

import kernels.cpu
from engine.sampler import draw
from engine.sequence import Proposed, Sequence
from engine.types import Request, Sampling
from kernels import reference
from kernels.ops import Ops
from tests.scripted_model import (
    Erring,
    MakeDrafter,
    Script,
    heads_drafter,
    own_drafter,
    scripted_engine,
    shared_drafter,
)

P_MIN = 1e-4
NUM_DRAWS = 4000
EXPECTED_MIN = 5  # the usual least of a cell; what is rarer is one cell together
V = 300  # more than the CPU table sorts at first
PROMPT = (3, 5)
OUTPUT = (7, 7, 11)

SAMPLINGS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "hot": {"temperature": 1.9},
    "top-k": {"temperature": 1.0, "top_k": 7},
    "top-p": {"temperature": 1.0, "top_p": 0.6},
    "min-p": {"temperature": 1.0, "min_p": 0.2},
    "all three": {"temperature": 1.4, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
    "penalties": {
        "temperature": 1.0,
        "frequency_penalty": 0.6,
        "presence_penalty": 0.5,
        "repetition_penalty": 1.5,
    },
    "negative penalties": {"temperature": 1.0, "frequency_penalty": -0.4, "repetition_penalty": 0.95, "top_p": 0.9},
    "bias": {"temperature": 1.0, "logit_bias": ((7, -100.0), (20, 3.0), (21, -1.5)), "top_k": 20},
}


def probabilities(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """(V,) of the token behind PROMPT and OUTPUT, by the definitions of each parameter, in 64 bits."""
    steered = logits.astype(np.float64)
    counts = np.bincount(OUTPUT, minlength=V)
    for token in {*PROMPT, *OUTPUT}:
        steered[token] *= sampling.repetition_penalty ** (-1 if steered[token] > 0 else 1)
    steered -= sampling.frequency_penalty * counts + sampling.presence_penalty * (counts > 0)
    for token, bias in sampling.logit_bias:
        steered[token] += bias
    order = np.argsort(-steered, kind="stable")
    mass = np.exp((steered[order] - steered.max()) / sampling.temperature)
    mass[sampling.top_k or V :] = 0
    mass[mass.cumsum() - mass >= sampling.top_p * mass.sum()] = 0  # the tokens before it have enough
    mass[mass < sampling.min_p] = 0
    result = np.zeros(V)
    result[order] = mass / mass.sum()
    return result


def p_value(counts: np.ndarray, expected: np.ndarray) -> float:
    """Pearson's: how likely an honest sampler is to stray at least so far. What may not be drawn must not be."""
    if counts[expected == 0].sum():
        return 0.0
    rare = expected < EXPECTED_MIN
    observed = [*counts[~rare], counts[rare].sum()]
    wanted = [*expected[~rare], expected[rare].sum()]
    cells = [(o, e) for o, e in zip(observed, wanted, strict=True) if e > 0]
    chi_square = sum((o - e) ** 2 / e for o, e in cells)
    half = torch.tensor([(len(cells) - 1) / 2, chi_square / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


@pytest.fixture(params=[reference.OPS, kernels.cpu.OPS], ids=lambda ops: ops.name)
def table(request) -> Ops:
    return request.param


def drawn(ops: Ops, logits: torch.Tensor, sampling: Sampling, num_choices: int = 1) -> np.ndarray:
    """(NUM_DRAWS,) tokens: one of each seed, or of each choice of fewer seeds."""
    shares = []
    for number in range(NUM_DRAWS):
        asked = Request(id=0, prompt=PROMPT, sampling=_with_seed(sampling, number // num_choices))
        sequence = Sequence(request=asked, choice=number % num_choices, rank=(0, 0, 0), length_max=99)
        sequence.tokens += OUTPUT
        sequence.reach(len(sequence.tokens) - 1)
        shares.append(sequence.share(1, first_logits=number))
    tokens = [brought.tokens[0] for brought in draw(ops, logits.expand(len(shares), -1), shares).accepted()]
    return np.array(tokens)


def _with_seed(sampling: Sampling, seed: int) -> Sampling:
    return Sampling(**{name: getattr(sampling, name) for name in sampling.__struct_fields__} | {"seed": seed})


@pytest.mark.parametrize("name", SAMPLINGS)
def test_drawn_tokens_follow_the_definition(table: Ops, name: str) -> None:
    torch.manual_seed(1)
    logits = torch.randn(V) * 2
    if "penalties" in name:
        logits = logits / 2
        logits[[*PROMPT, *OUTPUT]] = 8.0  # so likely that it shows what happens to them
    sampling = Sampling(tokens_max=9, **SAMPLINGS[name])
    counts = np.bincount(drawn(table, logits, sampling), minlength=V)
    assert p_value(counts, probabilities(logits.numpy(), sampling) * NUM_DRAWS) > P_MIN


def test_choices_of_one_seed_are_drawn_independently(table: Ops) -> None:
    torch.manual_seed(2)
    logits = torch.randn(V) * 3
    sampling = Sampling(tokens_max=9, temperature=1.0, top_k=6)
    pairs = drawn(table, logits, sampling, num_choices=2).reshape(-1, 2)
    counts = np.bincount(pairs[:, 0] * V + pairs[:, 1], minlength=V * V)
    each = probabilities(logits.numpy(), sampling)
    assert p_value(counts, np.outer(each, each).ravel() * len(pairs)) > P_MIN


def paths(script: Script, prompt: tuple[int, ...], length: int) -> dict[tuple[int, ...], float]:
    """Every output of this length under temperature 1, with its probability."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        grown: dict[tuple[int, ...], float] = {}
        for path, chance in found.items():
            logits = script.logits_after([*prompt, *path]).astype(np.float64)
            mass = np.exp(logits - logits.max())
            for token, share in enumerate(mass / mass.sum()):
                grown[*path, token] = chance * share
        found = grown
    return found


class Dice:
    """A draft is the likeliest token or any other, as the dice will have it: kept with the model's chance of it."""

    num_seen_behind = 0

    def __init__(self, script: Script, chance_right: float) -> None:
        self.script, self.chance_right, self.dice = script, chance_right, np.random.default_rng(3)

    def can_draft(self, sequence: Sequence) -> bool:
        return True

    def propose(self, wanted: Mapping[Sequence, int]) -> Proposed:
        return Proposed({sequence: self._drafts(sequence.tokens, num) for sequence, num in wanted.items()})

    def _drafts(self, tokens: list[int], num: int) -> list[int]:
        drafts: list[int] = []
        for _ in range(num):
            likeliest = int(self.script.logits_after([*tokens, *drafts]).argmax())
            is_right = self.dice.random() < self.chance_right
            drafts.append(likeliest if is_right else (likeliest + int(self.dice.integers(1, 5))) % 5)
        return drafts


SCRIPT = Script(vocab_size=5, memory=2)
DRAFTERS: dict[str, MakeDrafter] = {
    "mostly right": lambda *_: Dice(SCRIPT, 0.9),
    "often wrong": lambda *_: Dice(SCRIPT, 0.4),
    "always wrong": lambda *_: Dice(SCRIPT, 0.0),
    "a model, which draws by the same numbers": own_drafter(Erring(vocab_size=5, memory=2)),
    "a layer for multi-token prediction, likewise": heads_drafter(Erring(vocab_size=5, memory=2)),
    "fewer experts, which do too": shared_drafter(Erring(vocab_size=5, memory=2)),
}


@pytest.mark.parametrize("drafts", DRAFTERS)
def test_drafts_leave_the_distribution_of_whole_outputs_as_it_was(drafts: str) -> None:
    script, prompt, length = SCRIPT, (1, 2, 3), 4
    engine = scripted_engine(
        script, drafts_max=3, draft_cost=0.0, drafter=DRAFTERS[drafts], sequences_max=64, cache_tokens=4096
    )
    outputs: dict[int, list[int]] = {seed: [] for seed in range(NUM_DRAWS)}
    for seed in outputs:
        sampling = Sampling(tokens_max=length, temperature=1.0, seed=seed)
        engine.core.submit(Request(id=seed, prompt=prompt, sampling=sampling))
    while engine.core.has_work:
        for token in engine.core.step().tokens:
            outputs[token.request].append(token.token)
    seen = Counter(map(tuple, outputs.values()))
    expected = paths(script, prompt, length)
    counts = np.array([seen[path] for path in expected])
    assert counts.sum() == NUM_DRAWS
    assert p_value(counts, np.array(list(expected.values())) * NUM_DRAWS) > P_MIN
    stats = engine.core.stats()
    assert 0 < stats.num_accepted < stats.num_drafted  # what is wrong for the likeliest is sometimes drawn


def test_the_p_value_is_pearsons():
    """Of a fair coin that fell 530 times of 1000: chi-square 3.6, one degree of freedom."""
    assert math.isclose(p_value(np.array([530, 470]), np.array([500.0, 500.0])), math.erfc(math.sqrt(3.6 / 2)))
