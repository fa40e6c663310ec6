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
class Figure:
    """A number of a whole model."""

    what: str
    value: float
    unit: str
    share: float | None = None  # of the roofline, where there is one


@dataclass
class Report:
    """What a run found out."""

    device: str
    bytes_per_s: float = 0.0
    operations_per_s: float = 0.0  # of bf16
    fp8_operations_per_s: float = 0.0  # 0: not measured
    errors: dict[str, float] = field(default_factory=dict)  # of the norm, against fp64
    lines: list[Measured] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def picture(report: Report) -> str:
    """Each share of a bound as a bar, and each number without one as text."""
    lines: list[tuple[str, float | None, str]] = [
        (figure.what, figure.share, f"{figure.value:.4g} {figure.unit}") for figure in report.figures
    ]
    lines += [(line.what, line.share, f"{line.microseconds:.0f} us") for line in report.lines]
    height = 18
    rows = []
    for place, (what, share, value) in enumerate(lines):
        y = 40 + height * place
        bar = (
            ""
            if share is None
            else f'<rect x="380" y="{y}" width="{300 * min(share, 1.1):.0f}" height="12" fill="#4878a8"/>'
        )
        text = value if share is None else f"{share:.0%}, {value}"
        rows.append(f'<text x="0" y="{y + 12}">{what}</text>{bar}<text x="720" y="{y + 12}">{text}</text>')
    bounds = f"{report.bytes_per_s / 1e12:.2f} TB/s or {report.operations_per_s / 1e12:.0f} TFLOP/s"
    title = f"{report.device}: share of {bounds}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="900" height="{60 + height * len(rows)}" '
        f'font-family="sans-serif" font-size="11"><text x="0" y="20" font-size="14">{title}</text>{"".join(rows)}</svg>'
    )
