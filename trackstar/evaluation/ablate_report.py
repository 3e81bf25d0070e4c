"""Tables and the plot of an ablation.

Contract: the same results give the same bytes; drawn without a display.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trackstar.evaluation.measures import title_of
from trackstar.evaluation.plots import FAINT, INK, LINE, drawing, save
from trackstar.evaluation.tables import table, with_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TITLES = {"d": "coordinates of a row, d", "steps": "training steps", "size": "parameters"}
_MEASURES = ("mrr", "recall_at_10", "precision_at_1")
_ACCURACY = "#b3541e"


def markdown(results: Mapping[str, Any]) -> str:
    """The tables of results.json's content."""
    about = results["about"]
    lines = [
        "# Ablations",
        "",
        f"{about['queries']:,} queries of {about['facts']:,} facts with gold sentences, {about['sentences']:,} "
        "sentences.",
        f"In brackets: {about['level']:.0%} bootstrap intervals over queries. Ties: {about['ties']}.",
    ]
    for panel in results["axes"]:
        points = panel["points"]
        measures = [name for name in _MEASURES if name in points[0]["quality"]]
        heads = [_TITLES[panel["axis"]], *(title_of(name) for name in measures), "answered rightly", "held-out loss"]
        rows = [
            [
                f"{point['at']:,}",
                *(with_interval(point["quality"][name]) for name in measures),
                with_interval(point["accuracy"]),
                "" if point["held_out_loss"] is None else f"{point['held_out_loss']:.3f}",
            ]
            for point in points
        ]
        lines += ["", f"## By {_TITLES[panel['axis']]}", "", *table(heads, rows), "", _same(panel)]
    return "\n".join(lines) + "\n"


def draw(results: Mapping[str, Any], folder: Path) -> list[str]:
    """Write the plot; returns the files' names."""
    with drawing():
        return save(draw_axes(results), folder / "ablation")


def draw_axes(results: Mapping[str, Any]) -> Figure:
    """Quality, and the models' own accuracy, against each axis, with intervals."""
    from matplotlib.figure import Figure

    axes = results["axes"]
    figure = Figure(figsize=(4.0 * len(axes), 3.6), layout="constrained")
    panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
    for panel, axis in zip(panels, axes, strict=True):
        points = axis["points"]
        at = [point["at"] for point in points]
        for name, style in (("mrr", "o-"), ("recall_at_10", "s--")):
            if name in points[0]["quality"]:
                _curve(panel, at, [point["quality"][name] for point in points], style, LINE, title_of(name))
        if axis["axis"] != "d":
            _curve(panel, at, [point["accuracy"] for point in points], "^:", _ACCURACY, "answered rightly")
        panel.set_xscale("log", base=2 if axis["axis"] == "d" else 10)
        panel.minorticks_off()
        panel.set_xticks(at, [_short(value) for value in at])
        panel.set_ylim(-0.03, 1.03)
        panel.set_xlabel(_TITLES[axis["axis"]])
        panel.grid(color=FAINT)
        panel.set_axisbelow(True)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
        panel.legend(frameon=False, fontsize=8, labelcolor=INK)
    about = results["about"]
    figure.supxlabel(
        f"mean over {about['queries']:,} queries, {about['sentences']:,} sentences; bars: {about['level']:.0%} "
        "bootstrap intervals",
        fontsize=8,
    )
    return figure


def _curve(panel: Axes, at: list[int], found: list[Mapping[str, float]], style: str, colour: str, label: str) -> None:
    means = np.array([item["mean"] for item in found])
    ends = np.array([[item["mean"] - item["low"], item["high"] - item["mean"]] for item in found]).T
    panel.errorbar(at, means, yerr=ends.clip(min=0), fmt=style, color=colour, capsize=3, ms=4, label=label)


def _same(panel: Mapping[str, Any]) -> str:
    """What the points of an axis have in common."""
    if panel["axis"] != "d":
        dims = sorted({point["d"] for point in panel["points"]})
        return f"d = {', '.join(f'{dim:,}' for dim in dims)}."
    spread = [
        f"{point['at']:,} = {2 * point['projection']['layer_blocks']} blocks of {point['projection']['rows']} x "
        f"{point['projection']['cols']}"
        for point in panel["points"]
    ]
    return f"{'; '.join(spread)}."


def _short(value: int) -> str:
    """A number for an axis."""
    for size, suffix in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if value >= 10 * size or (value >= size and value % size == 0):
            return f"{value / size:.3g}{suffix}"
    return f"{value:,}" if value < 10**6 else f"{value / 10**6:.3g}M"
