"""Tables and plots of an evaluation by retraining.

Contract: the same results give the same bytes; drawn without a display.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trackstar.evaluation.plots import FAINT, LINE, drawing, save
from trackstar.evaluation.tables import table, with_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def markdown(results: Mapping[str, Any]) -> str:
    """The tables of results.json's content."""
    about, methods = results["about"], results["methods"]
    depths = [item["depth"] for item in methods[0]["removals"]]
    rows = [
        [
            item["name"],
            with_interval(item["lds"]),
            _ends(item["lds_over_subsets"]),
            *(with_interval(removal["rise"]) for removal in item["removals"]),
            with_interval(item["mrr"]),
        ]
        for item in methods
    ]
    heads = [f"loss rise without first {depth}" for depth in depths]
    lines = [
        "# Retraining",
        "",
        f"{about['queries']:,} queries, {about['sentences']:,} passages; {about['retrainings']:,} retrainings, of them "
        f"{about['subsets']:,} on random subsets of {about['kept_by_a_subset']:,} passages. Trained on all, the model "
        f"answers {about['answered_right']:,} queries rightly; mean loss of the targets {about['loss']:.3f} nats, on "
        f"subsets {about['loss_on_subsets']:.3f}.",
        f"In brackets: {about['level']:.0%} bootstrap intervals over queries; the second ones of LDS over subsets. "
        f"Rises are in nats; {about['queries_per_run']:,} queries share a run. Ties: {about['ties']}.",
        "",
        *table(["method", "LDS", "over subsets", *heads, "MRR"], rows),
        "",
        "Passages that a run of removals leaves out, on average:",
        "",
        *table(
            ["method", *(f"first {depth}" for depth in depths)],
            [[item["name"], *(f"{removal['removed']:.1f}" for removal in item["removals"])] for item in methods],
        ),
    ]
    return "\n".join(lines) + "\n"


def draw(results: Mapping[str, Any], folder: Path) -> list[str]:
    """Write all plots; returns the files' names."""
    with drawing():
        return [*save(draw_scores(results), folder / "lds"), *save(draw_rises(results), folder / "rises")]


def draw_scores(results: Mapping[str, Any]) -> Figure:
    """LDS of every method, with its interval over queries (thick) and over subsets (thin)."""
    methods = results["methods"]
    figure, (panel,) = _panels(methods, ["linear datamodeling score"])
    _points(panel, [item["lds_over_subsets"] for item in methods], linewidth=0.8, capsize=4)
    _points(panel, [item["lds"] for item in methods], linewidth=2.4, capsize=0)
    about = results["about"]
    figure.supxlabel(
        f"mean over {about['queries']:,} queries, {about['subsets']:,} subsets; bars: {about['level']:.0%} bootstrap "
        "intervals over queries (thick) and subsets (thin)",
        fontsize=8,
    )
    return figure


def draw_rises(results: Mapping[str, Any]) -> Figure:
    """Rise of the queries' loss without each method's first passages, a panel for each depth."""
    methods = results["methods"]
    depths = [item["depth"] for item in methods[0]["removals"]]
    figure, panels = _panels(methods, [f"loss rise without first {depth}" for depth in depths])
    for number, panel in enumerate(panels):
        _points(panel, [item["removals"][number]["rise"] for item in methods], linewidth=1.6, capsize=3)
    about = results["about"]
    figure.supxlabel(
        f"nats, mean over {about['queries']:,} queries; {about['queries_per_run']:,} share a run; bars: "
        f"{about['level']:.0%} bootstrap intervals",
        fontsize=8,
    )
    return figure


def _panels(methods: Sequence[Mapping[str, Any]], titles: Sequence[str]) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(titles) + 2.2, 0.34 * len(methods) + 1.3), layout="constrained")
    panels = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, fontsize=11)
        panel.axvline(0, color=FAINT, linewidth=1.2)
        panel.grid(color=FAINT, linewidth=0.5)
        panel.set_axisbelow(True)
        for side in ("top", "right", "left"):
            panel.spines[side].set_visible(False)
        panel.tick_params(axis="y", length=0)
    panels[0].set_yticks(np.arange(len(methods)), [item["name"] for item in methods])
    panels[0].set_ylim(len(methods) - 0.4, -0.6)
    return figure, list(panels)


def _points(panel: Axes, numbers: Sequence[Mapping[str, float]], *, linewidth: float, capsize: float) -> None:
    means = np.array([item["mean"] for item in numbers])
    ends = np.array([[item["mean"] - item["low"], item["high"] - item["mean"]] for item in numbers]).T
    panel.errorbar(
        means,
        np.arange(len(numbers)),
        xerr=ends.clip(min=0),
        fmt="o",
        color=LINE,
        elinewidth=linewidth,
        capsize=capsize,
        ms=5,
    )


def _ends(numbers: Mapping[str, float]) -> str:
    return with_interval(numbers).partition(" ")[2]
