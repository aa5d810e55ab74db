"""A picture of a decode plan: which program reads which keys of which sequence, when; idle tail and fixup."""

from __future__ import annotations

import html
import io
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from headfold.bench.schedule import Run, Schedule

FORMATS = (".png", ".svg", ".html")
_SVG = "http://www.w3.org/2000/svg"
_START, _FIXUP, _IDLE = "#444444", "#c0392b", "#eeeeee"
LABELLED = 0.06  # bars wider than this share of the picture say their keys
_PAGE = """<!doctype html>
<meta charset="utf-8"><title>{title}</title>
<style>body {{ font-family: sans-serif; margin: 1em }} svg {{ max-width: 100%; height: auto }}</style>
<p>Point at a bar to see its keys.</p>
{svg}
"""


def check_format(path: Path) -> None:
    """Raise ValueError unless the file's name ends in a format that a plan's picture can have."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"--picture is {str(path)!r}; its name must end in {', '.join(FORMATS)}")


def draw(schedule: Schedule, title: str, path: Path) -> None:
    """Write the picture; an .html file names the keys of a bar that is pointed at.

    Raises:
        ValueError: another format.
        ModuleNotFoundError: matplotlib is not installed.
    """
    check_format(path)
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "headfold", "font.size": 9, "axes.titlesize": 10}):
        figure = _figure(schedule, title)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".png":
            figure.savefig(path, dpi=200)
            return
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    svg = drawn.getvalue()
    if path.suffix.lower() == ".html":
        svg = _PAGE.format(title=html.escape(title), svg=_with_tooltips(svg, schedule))
    path.write_text(svg)


def words(run: Run) -> str:
    """A program in words."""
    p = run.program
    keys = f"keys {p.low} to {p.high - 1}" if p.keys else "no keys"
    return (
        f"program {p.number}: sequence {p.sequence}, tile {p.tile}, head unit {p.unit}, split {p.split}, {keys}; "
        f"{run.start_us:.1f} to {run.end_us:.1f} us in slot {run.slot}"
    )


def _figure(schedule: Schedule, title: str) -> Any:
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    used = max((r.slot for r in schedule.runs), default=0) + 1
    figure = Figure(figsize=(11, min(14.0, 2.2 + 0.07 * schedule.slots)), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor(_IDLE)
    sequences = sorted({r.program.sequence for r in schedule.runs})
    colours = colormaps["tab20"]
    for run in schedule.runs:
        p = run.program
        # Neighbours in the colour map, so that sequences side by side differ; splits of one are told by lightness.
        colour = colours(p.sequence % 20)
        lightness = 1.0 - 0.5 * (p.split % 4) / 4
        axes.add_patch(
            Rectangle(
                (run.start_us, run.slot),
                run.end_us - run.start_us,
                1.0,
                facecolor=(*colour[:3], lightness),
                edgecolor="white",
                linewidth=0.3,
                gid=f"program-{p.number}",
            )
        )
        axes.add_patch(
            Rectangle((run.start_us, run.slot + 0.35), run.full_us - run.start_us, 0.3, facecolor=_START)
        )
        if run.end_us - run.start_us > LABELLED * schedule.end_us:
            middle = (run.full_us + run.end_us) / 2, run.slot + 0.5
            axes.text(*middle, f"{p.low} - {p.high - 1}", fontsize=3.8, ha="center", va="center")
    if schedule.fixup_us:
        axes.axvspan(schedule.loop_end_us, schedule.end_us, facecolor=_FIXUP, gid="fixup")
    axes.set_xlim(0, max(schedule.end_us, 1e-3) * 1.01)
    axes.set_ylim(max(used, schedule.slots), 0)
    axes.set_xlabel("microseconds from the launch, by the planner's cost model")
    axes.set_ylabel("programs that run at a time")
    axes.spines[["top", "right"]].set_visible(False)
    key = [Patch(color=colours(s % 20), label=f"sequence {s}") for s in sequences[:12]]
    if len(sequences) > 12:
        key.append(Patch(color="white", label=f"... {len(sequences)} sequences"))
    key += [Patch(color=_START, label="start"), Patch(color=_IDLE, label=f"idle ({schedule.idle:.0%})")]
    if schedule.fixup_us:
        key.append(Patch(color=_FIXUP, label=f"fixup ({schedule.fixup_us:.1f} us)"))
    axes.legend(handles=key, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)
    axes.set_title(f"{title}\n{len(schedule.runs)} programs, {schedule.end_us:,.1f} us", loc="left")
    return figure


def _with_tooltips(svg: str, schedule: Schedule) -> str:
    """The picture with a title on every program's bar, which browsers show beside the pointer."""
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(svg)
    bars = {e.get("id"): e for e in root.iter(f"{{{_SVG}}}g") if (e.get("id") or "").startswith("program-")}
    for run in schedule.runs:
        tip = ElementTree.Element(f"{{{_SVG}}}title")
        tip.text = words(run)
        bars[f"program-{run.program.number}"].insert(0, tip)
    return ElementTree.tostring(root, encoding="unicode")
