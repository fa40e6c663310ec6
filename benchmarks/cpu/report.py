"""What a contest found: JSON, a table, a picture. Owns how passes become one figure, and what is compared with what."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from statistics import median

from benchmarks.cpu.contest import Result
from benchmarks.cpu.loads import TITLES
from benchmarks.cpu.peers import CONTENDERS, OURS, Contender

FOREIGN_CORES_MAX = 0.1  # a pass beside more than that does not count, unless all were
BAR_WIDTH = 420
LINE_HEIGHT = 18


@dataclass
class Report:
    """All passes of one checkpoint, and who could not take part."""

    machine: str
    checkpoint: str
    versions: dict[str, str] = field(default_factory=dict)  # by contender
    missing: dict[str, str] = field(default_factory=dict)  # contender -> why
    results: list[Result] = field(default_factory=list)

    def as_json(self) -> Mapping[str, object]:
        """Everything, each pass by itself."""
        return asdict(self)

    @property
    def loads(self) -> list[str]:
        """Those played."""
        return [load for load in TITLES if any(result.load == load for result in self.results)]

    def speed(self, contender: str, load: str) -> float:
        """Its median in tokens/s of the passes that nothing disturbed; of all where all were. 0: it has none."""
        passes = [result for result in self.results if (result.contender, result.load) == (contender, load)]
        quiet = [result for result in passes if result.foreign_cores <= FOREIGN_CORES_MAX]
        return median([result.tokens_per_s for result in quiet or passes] or [0.0])

    def first_token_s(self, contender: str, load: str) -> float | None:
        """The median."""
        times = [r.first_token_s for r in self.results if (r.contender, r.load) == (contender, load)]
        known = [time for time in times if time is not None]
        return median(known) if known else None

    def peak_bytes(self, contender: str) -> int:
        """The most that it ever held."""
        return max(result.peak_bytes for result in self.results if result.contender == contender)

    def lead(self, load: str) -> tuple[float, str, str]:
        """Ours over the peer that comes closest, of those with no fewer bits than ours; and the two.

        Each peer is met by the fastest of ours that has no more bits than it.
        """
        leads = [
            (self.speed(own.name, load) / self.speed(peer.name, load), own.name, peer.name)
            for peer in self._playing(peers=True)
            if (own := self._fastest_within(peer.bits, load))
        ]
        return min(leads, default=(float("nan"), "", ""))

    def _fastest_within(self, bits: float, load: str) -> Contender | None:
        able = [own for own in self._playing(peers=False) if own.bits <= bits]
        return max(able, key=lambda own: self.speed(own.name, load), default=None)

    def _playing(self, *, peers: bool) -> Iterator[Contender]:
        for name in self.versions:
            if (CONTENDERS[name] not in OURS) == peers:
                yield CONTENDERS[name]

    def table(self) -> str:
        """Markdown: a line for each contender, then what the bar is about, then who is missing."""
        loads = self.loads
        lines = [
            f"Output tokens/s, {self.checkpoint}, {self.machine}.",
            "",
            f"| engine | weights | bits | {' | '.join(loads)} | first token, {loads[-1]} | peak memory |",
            "|---|---|---|" + "---|" * (len(loads) + 2),
            *(self._line(CONTENDERS[name]) for name in self.versions),
            "",
        ]
        for load in loads:
            ratio, own, peer = self.lead(load)
            lines.append(f"{load} ({TITLES[load]}): {own} is {ratio:.2f} times as fast as {peer}, the nearest.")
        lines += [f"{name} did not take part: {why}." for name, why in self.missing.items()]
        return "\n".join(lines)

    def _line(self, contender: Contender) -> str:
        speeds = " | ".join(f"{self.speed(contender.name, load):.0f}" for load in self.loads)
        first_s = self.first_token_s(contender.name, self.loads[-1])
        first = "" if first_s is None else f"{first_s:.2f} s"
        peak = f"{self.peak_bytes(contender.name) / 1e9:.2f} GB"
        return f"| {contender.engine} | {contender.weights} | {contender.bits:g} | {speeds} | {first} | {peak} |"

    def picture(self) -> str:
        """SVG: bars for each load, ours in colour."""
        parts: list[str] = []
        height = 34
        for load in self.loads:
            parts.append(f'<text x="10" y="{height}" font-weight="bold">{load}: {TITLES[load]}</text>')
            bars = sorted(((self.speed(name, load), name) for name in self.versions), reverse=True)
            parts += [_bar(height + 8 + row * LINE_HEIGHT, *bar, bars[0][0]) for row, bar in enumerate(bars)]
            height += 8 + len(bars) * LINE_HEIGHT + 30
        title = f"Output tokens/s, {self.checkpoint}, {self.machine}"
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="680" height="{height}" font-family="sans-serif" '
            f'font-size="12"><rect width="100%" height="100%" fill="white"/><text x="10" y="14">{title}</text>'
            f"{''.join(parts)}</svg>"
        )


def _bar(top: int, speed: float, name: str, fastest: float) -> str:
    colour = "#d9480f" if CONTENDERS[name] in OURS else "#adb5bd"
    width = BAR_WIDTH * speed / fastest
    middle = top + 12
    return (
        f'<text x="150" y="{middle}" text-anchor="end">{name}</text>'
        f'<rect x="160" y="{top}" width="{width:.0f}" height="{LINE_HEIGHT - 4}" fill="{colour}"/>'
        f'<text x="{166 + width:.0f}" y="{middle}">{speed:.0f}</text>'
    )
