"""Faults of the engine and the machine under it: bad numbers, no memory, hangs, damaged models, a clock that is set."""

import asyncio
import json
import random
import shutil
import struct
import time
from collections import Counter
from pathlib import Path
from typing import Any

from schemas.results import ErrorCode
from tests.campaign import Campaign, in_nursery, request, some_requests
from tests.chaos.fault import Fault, Finding, Trial, judged
from tests.chaos.workers import STEP_S
from tests.worker_process import HANGING_SEED, NAN_PROMPT, STARVED_SEED, Loading, load_model, shared
from worker.commands.answers import texts
from worker.errors import Fatal, Misconfigured

COMPANIONS = 31  # of the guilty request: together a batch of 32
ATTEMPTS_MAX = 3  # the fewest: each costs a worker its life
SILENCE_S_MAX = 2.0
LOAD_S_MAX = 1.0
LOAD_BYTES_MAX = 200 << 20
HOUR_S = 3600.0
BROKEN = Loading(1, 0.0, 0)  # of a process that ended otherwise


async def guilty_request(trial: Trial) -> Finding:
    """One request of 32 brings bad numbers, uses up the memory, or never ends. Only that one may fail."""
    dice, wrong = trial.dice, []
    async with trial.group(partitions=2, attempts_max=ATTEMPTS_MAX, silence_s_max=SILENCE_S_MAX) as campaign:
        campaign.hire("a")
        for number in range(trial.size):
            prompts = [f"{number} {companion} the quick brown fox" for companion in range(COMPANIONS)]
            clean = await answers(campaign, [companion(campaign, dice_of(trial, prompt), prompt) for prompt in prompts])
            kind = GUILTY[number % len(GUILTY)]
            batch = [companion(campaign, dice_of(trial, prompt), prompt) for prompt in prompts]
            batch.insert(dice.randrange(COMPANIONS), guilty(campaign, kind))
            found = await answers(campaign, batch)
            expected = ErrorCode.INFERENCE_ERROR if kind == "nan" else ErrorCode.POISONED
            if found.pop(kind) != expected:
                wrong.append(f"strike {number}: the guilty request ({kind}) was not answered {expected}")
            if found != clean:
                wrong.append(f"strike {number}: {kind} changed the answers of its companions")
        finding = await judged(
            campaign,
            violations=wrong,
            failures={ErrorCode.INFERENCE_ERROR, ErrorCode.POISONED},
            deaths={Fatal.exit_code},
        )
        finding.notes.append(f"seed {trial.seed}: {len(campaign.deaths)} workers ended by themselves")
        return finding


# Bad numbers fail one request; the others end the process, three times each, and take their time.
GUILTY = (*["nan"] * 5, "memory", *["nan"] * 10, "hang", *["nan"] * 8)


def guilty(campaign: Campaign, kind: str) -> bytes:
    """The request that does it."""
    if kind == "nan":
        return request(campaign.model.name, NAN_PROMPT, tokens=20, name=kind)
    seed = {"memory": STARVED_SEED, "hang": HANGING_SEED}[kind]
    return request(campaign.model.name, "guilty", tokens=20, name=kind, seed=seed)


def companion(campaign: Campaign, dice: random.Random, prompt: str) -> bytes:
    """A request whose answer hangs on nothing but itself."""
    return request(
        campaign.model.name, prompt, tokens=20, temperature=dice.choice((0, 1)), seed=dice.randrange(100, 999)
    )


def dice_of(trial: Trial, prompt: str) -> random.Random:
    """The same throws for the same prompt."""
    return random.Random(f"{trial.seed} {prompt}")


async def answers(campaign: Campaign, values: list[bytes]) -> dict[str, str]:
    """What each of these requests was answered, by its name: the text, or the failure's code."""
    asked = set(await campaign.ask(values))
    await campaign.until_answered(asked)
    found = [one for one in campaign.live.completions if one.input in asked]
    return {one.custom_id: one.error.code if one.error else texts(one)[0] for one in found if one.custom_id}


async def hostile_models(trial: Trial) -> Finding:
    """Model folders that are damaged or made to harm are refused by name, at once and for little memory."""
    finding, outcomes = Finding(), Counter[str]()
    pristine = await trial.stack.checkpoint()
    for number in range(trial.size):
        dice = random.Random(trial.seed * trial.size + number)
        folder = shutil.copytree(pristine, trial.folder / "model")
        change = dice.choice(DAMAGE)
        change(dice, folder)
        loading = await asyncio.to_thread(in_nursery, load_model, str(folder), BROKEN)
        outcomes[{0: "loaded all the same", Misconfigured.exit_code: "refused"}.get(loading.exit_code, "broke")] += 1
        about = f"{change.__name__}, number {number}"
        finding.expect(loading.exit_code in (0, Misconfigured.exit_code), f"{about}: {loading}")
        finding.expect(loading.duration_s <= LOAD_S_MAX, f"{about}: took {loading.duration_s:.1f} s")
        finding.expect(loading.grown_bytes <= LOAD_BYTES_MAX, f"{about}: took {loading.grown_bytes >> 20} MiB")
        shutil.rmtree(folder)
    finding.notes.append(f"{dict(outcomes)}")
    return finding


def cut(dice: random.Random, folder: Path) -> None:
    """A file ends early."""
    file = any_file(dice, folder)
    file.write_bytes(file.read_bytes()[: dice.randrange(file.stat().st_size)])


def flip(dice: random.Random, folder: Path) -> None:
    """Bytes at the start of a file, where headers are, become others."""
    file = any_file(dice, folder)
    content = bytearray(file.read_bytes())
    for _ in range(dice.randint(1, 8)):
        content[dice.randrange(min(len(content), 2000))] = dice.randrange(256)
    file.write_bytes(content)


def gone(dice: random.Random, folder: Path) -> None:
    """A file is not there."""
    any_file(dice, folder).unlink()


def long_header(dice: random.Random, folder: Path) -> None:
    """The header says that it is longer than the file, or than memory."""
    rewrite_header(folder, length=dice.choice((2**63, 2**64 - 1, 2**31, 2**40, 0, 1)))


def lying_header(dice: random.Random, folder: Path) -> None:
    """Offsets overlap, leave the file or go backwards; shapes do not fit them."""
    header = read_header(folder)
    tensor = header[dice.choice([name for name in header if name != "__metadata__"])]
    start, end = tensor["data_offsets"]
    tensor.update(
        dice.choice(
            (
                {"data_offsets": [0, end - start]},
                {"data_offsets": [end, start]},
                {"data_offsets": [start, 2**62]},
                {"data_offsets": [-1, end]},
                {"shape": [2**31, 2**31]},
                {"shape": [*tensor["shape"], 0]},
                {"shape": []},
                {"dtype": dice.choice(("I64", "BOOL", "F8_E4M3", "nonsense"))},
            )
        )
    )
    rewrite_header(folder, json.dumps(header).encode())


def bomb(dice: random.Random, folder: Path) -> None:
    """JSON that is deep, long, or full of huge numbers."""
    name = dice.choice(("config.json", "tokenizer.json", "generation_config.json", "model.safetensors"))
    value = dice.choice((b"[" * 200_000, b'{"a":' * 100_000, b"9" * 2_000_000, b'"' + b"a" * (20 << 20) + b'"'))
    if name == "model.safetensors":
        rewrite_header(folder, value)
    else:
        (folder / name).write_bytes(value)


def odd_config(dice: random.Random, folder: Path) -> None:
    """A number of the configuration is one that nobody would choose."""
    config = json.loads((folder / "config.json").read_text())
    name = dice.choice([name for name, value in config.items() if isinstance(value, int | float)])
    config[name] = dice.choice((-1, 0, 2**31, 2**63, 1e308, None, "1", [], {}))
    (folder / "config.json").write_text(json.dumps(config))


DAMAGE = (cut, flip, gone, long_header, lying_header, bomb, odd_config)


def any_file(dice: random.Random, folder: Path) -> Path:
    """One of the model's files."""
    return dice.choice(sorted(path for path in folder.iterdir() if path.stat().st_size))


def read_header(folder: Path) -> dict[str, Any]:
    """What the safetensors file says of its tensors."""
    content = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return dict(json.loads(content[8 : 8 + length]))


def rewrite_header(folder: Path, header: bytes | None = None, length: int | None = None) -> None:
    """The file has another header, or one that says it is so long."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    (own,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + own] if header is None else header
    file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + content[8 + own :])


async def clock_steps(trial: Trial) -> Finding:
    """The workers' wall clock is set an hour ahead and back again, under load.

    Money and what passes on one machine are measured by a clock that nobody sets: no step may show in either.
    """
    dice, wrong, begun_s = trial.dice, [], time.monotonic()
    async with trial.group(step_s=STEP_S) as campaign:
        clock = shared(trial.folder / "clock")
        for name in "ab":
            campaign.hire(name, clock_file=str(trial.folder / "clock"))
        await campaign.recovery_s()
        for hours in dice.choice(((1, 0), (-1, 0), (1, -1))):
            await campaign.ask(some_requests(dice, campaign.model, 100))
            await asyncio.sleep(0.3)
            struct.pack_into("<d", clock, 0, hours * HOUR_S)
        await campaign.until_answered()
        most_ms = (time.monotonic() - begun_s) * 1000
        for one in campaign.live.completions:
            parts = one.timing and (one.timing.time_to_first_token_ms, one.timing.generation_time_ms)
            if parts and not 0 <= min(parts) <= max(parts) <= most_ms:
                wrong.append(f"{one.custom_id} took {parts} ms of {most_ms:.0f}")
        return await judged(campaign, violations=wrong)


FAULTS = (
    Fault(
        id="F13",
        title=f"one request of {COMPANIONS + 1} brings bad numbers, takes all memory, or hangs beyond the watchdog",
        unit="guilty requests",
        pr=50,
        nightly=1000,
        per_trial=25,
        percent=60,
        run=guilty_request,
    ),
    Fault(
        id="F17",
        title="model folders that are damaged or made to harm: cut, flipped, lying headers, JSON bombs, odd numbers",
        unit="folders",
        pr=200,
        nightly=10_000,
        per_trial=100,
        percent=100,
        run=hostile_models,
    ),
    Fault(
        id="F18",
        title="the wall clock steps by an hour, ahead or back, and again",
        unit="workers' clocks",
        pr=2,
        nightly=10,
        percent=50,
        run=clock_steps,
    ),
)
