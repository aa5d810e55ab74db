"""Pictures of a result: speed against PyTorch's best, and how near a case comes to the machine's ceiling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headfold.bench.results import Result, Row

FORMATS = (".svg", ".png")
_COLOURS = {
    "decode": "#1f77b4",
    "paged decode": "#17a2a2",
    "ragged decode": "#7a5195",
    "speculative": "#d98a1f",
    "prefill": "#4c8c4a",
    "ragged prefill": "#8fbf6a",
}
_GREY = "#666666"


def check_format(path: Path) -> None:
    """Raise ValueError unless the file's name ends in a format that a picture can have."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"--picture is {str(path)!r}; its name must end in {' or '.join(FORMATS)}")


def draw(result: Result, path: Path) -> None:
    """Write a bar chart of headfold's rows.

    Raises:
        ValueError: another format than SVG or PNG, or no row of headfold's with a time.
        ModuleNotFoundError: matplotlib is not installed.
    """
    check_format(path)
    rows = [row for row in (result.own(name) for name in result.cases) if row is not None]
    if not rows:
        raise ValueError(f"--picture is {str(path)!r}, but the result holds no time of headfold's to draw")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "headfold", "font.size": 9, "axes.titlesize": 10}):
        figure = Figure(figsize=(9.5, 1.3 + 0.27 * len(rows)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        _bars(left, rows, [result.speedup(r) for r in rows], "{:.2f}x")
        left.set_title("Speed, PyTorch's best = 1")
        _bars(right, rows, [r.ceiling_fraction for r in rows], "{:.0%}")
        right.set_title("Share of the measured ceiling (read or matmul)")
        right.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25%", "50%", "75%", "100%"])
        left.set_yticks(range(len(rows)), [r.case for r in rows])
        left.set_ylim(len(rows) - 0.4, -0.6)
        versions = result.versions
        figure.suptitle(
            f"headfold {versions['headfold']} on {result.device}, torch {versions['torch']}", fontsize=11
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        stable: dict[str, Any] = {"Date": None} if path.suffix.lower() == ".svg" else {}
        figure.savefig(path, dpi=150, metadata=stable)


def _bars(axes: Any, rows: list[Row], values: list[float | None], label: str) -> None:
    bars = axes.barh(
        range(len(rows)),
        [v or 0.0 for v in values],
        height=0.7,
        color=[_COLOURS.get(r.kind, _GREY) for r in rows],
    )
    texts = axes.bar_label(
        bars, ["not measured" if v is None else label.format(v) for v in values], padding=3, fontsize=8
    )
    for text in texts:
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.8})
    axes.axvline(1.0, color=_GREY, linewidth=0.8)
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlim(0, max([1.0, *(v for v in values if v is not None)]) * 1.15)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
