"""What a run found out, as numbers and as a picture.

Owns the report's form. Never measures.
"""

from dataclasses import dataclass, field


@dataclass
class Measured:
    """One line of the table."""

    what: str
    microseconds: float
    bytes: float  # that must be moved
    operations: float  # of the matrix products
    share: float = 0.0  # of the device's bound, the nearer of the two
    gigabytes_per_s: float = 0.0
    teraflops_per_s: float = 0.0


@dataclass
class Report:
    """What a run found out."""

    device: str
    bytes_per_s: float = 0.0
    operations_per_s: float = 0.0  # of bf16
    fp8_operations_per_s: float = 0.0  # 0: not measured
    errors: dict[str, float] = field(default_factory=dict)  # of the norm, against fp64
    lines: list[Measured] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def picture(report: Report) -> str:
    """Each line's share of its bound as a bar."""
    height = 18
    bars = [
        f'<text x="0" y="{y + 12}">{line.what}</text>'
        f'<rect x="380" y="{y}" width="{300 * min(line.share, 1.1):.0f}" height="12" fill="#4878a8"/>'
        f'<text x="{690}" y="{y + 12}">{line.share:.0%}, {line.microseconds:.0f} us</text>'
        for y, line in zip(range(40, 10**6, height), report.lines, strict=False)
    ]
    ceilings = f"{report.bytes_per_s / 1e12:.2f} TB/s or {report.operations_per_s / 1e12:.0f} TFLOP/s"
    title = f"{report.device}: share of {ceilings}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="820" height="{60 + height * len(bars)}" '
        f'font-family="sans-serif" font-size="11"><text x="0" y="20" font-size="14">{title}</text>{"".join(bars)}</svg>'
    )
