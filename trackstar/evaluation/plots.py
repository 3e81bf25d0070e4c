"""Plots of an evaluation, as PNG and SVG: every method with its interval, and where each is strong.

Contract: the same results give the same bytes; drawn without a display. Measures lie between 0 and 1.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trackstar.evaluation.measures import title_of
from trackstar.storage import publish

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MEASURES = ("mrr", "recall_at_10", "precision_at_1")
INK, LINE, FAINT = "#1b2a3a", "#2c6fa6", "#d7dde3"


def draw_all(results: Mapping[str, Any], folder: Path) -> list[str]:
    """Write all plots that the results give; returns the files' names."""
    names = []
    with drawing():
        names += save(draw_methods(results), folder / "methods")
        names += save(draw_groups(results, "bucket", "MRR by frequency of the fact"), folder / "buckets")
        if results["methods"][0]["by"].get("prediction"):
            names += save(draw_groups(results, "prediction", "MRR by the model's own answer"), folder / "predictions")
    return names


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """How all plots are drawn, so that the same results give the same bytes."""
    import matplotlib

    # Ids in SVG files are random without a salt.
    settings: Any = {"svg.hashsalt": "trackstar", "svg.fonttype": "path", "font.size": 10, "text.color": INK}
    with matplotlib.rc_context(settings):
        yield


def draw_methods(results: Mapping[str, Any]) -> Figure:
    """Means and intervals of every method, a panel for each measure."""
    from matplotlib.figure import Figure

    methods: Sequence[Mapping[str, Any]] = results["methods"]
    measures = [name for name in _MEASURES if name in methods[0]["overall"]]
    figure = Figure(figsize=(3.2 * len(measures) + 2.2, 0.34 * len(methods) + 1.3), layout="constrained")
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    places = np.arange(len(methods))
    for panel, name in zip(panels, measures, strict=True):
        numbers = [item["overall"][name] for item in methods]
        means = np.array([item["mean"] for item in numbers])
        ends = np.array([[item["mean"] - item["low"], item["high"] - item["mean"]] for item in numbers]).T
        panel.errorbar(means, places, xerr=ends.clip(min=0), fmt="o", color=LINE, ecolor=LINE, capsize=3, ms=5)
        for mean, place in zip(means, places, strict=True):
            panel.annotate(
                f"{mean:.3f}", (mean, place), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=7.5
            )
        panel.set_title(title_of(name), fontsize=11)
        panel.set_xlim(-0.04, 1.04)
        panel.grid(axis="x", color=FAINT)
        panel.grid(axis="y", color=FAINT, linewidth=0.5)
        panel.set_axisbelow(True)
        for side in ("top", "right", "left"):
            panel.spines[side].set_visible(False)
        panel.tick_params(axis="y", length=0)
    panels[0].set_yticks(places, [item["name"] for item in methods])
    panels[0].set_ylim(len(methods) - 0.4, -0.6)
    figure.supxlabel(_caption(results), fontsize=8)
    return figure


def draw_groups(results: Mapping[str, Any], group: str, title: str) -> Figure:
    """MRR of every method (rows) in every group (columns), as shaded cells with their values."""
    from matplotlib.figure import Figure

    methods: Sequence[Mapping[str, Any]] = results["methods"]
    counts = {part["label"]: part["queries"] for part in methods[0]["by"][group]}
    values = np.array([[part["mrr"]["mean"] for part in item["by"][group]] for item in methods])
    figure = Figure(figsize=(1.0 * len(counts) + 3.2, 0.34 * len(methods) + 1.5), layout="constrained")
    panel = figure.subplots()
    panel.imshow(values, cmap="Blues", vmin=0, vmax=1.25, aspect="auto")
    for row, column in np.ndindex(*values.shape):
        value = values[row, column]
        colour = "white" if value > 0.75 else INK
        panel.text(column, row, f"{value:.3f}", ha="center", va="center", color=colour, fontsize=9)
    panel.set_xticks(range(len(counts)), [f"{label}\n({count:,})" for label, count in counts.items()])
    panel.set_yticks(range(len(methods)), [item["name"] for item in methods])
    panel.tick_params(length=0)
    for spine in panel.spines.values():
        spine.set_visible(False)
    panel.set_title(title, fontsize=11)
    figure.supxlabel("queries in parentheses", fontsize=8)
    return figure


def _caption(results: Mapping[str, Any]) -> str:
    about = results["about"]
    return (
        f"mean over {about['queries']:,} queries, {about['sentences']:,} sentences; bars: {about['level']:.0%} "
        "bootstrap intervals"
    )


def save(figure: Figure, stem: Path) -> list[str]:
    """Write a figure as PNG and SVG; returns the files' names."""
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
        data = io.BytesIO()
        figure.savefig(data, format=suffix[1:], dpi=150, metadata=metadata)
        publish(stem.with_suffix(suffix), data.getvalue())
    return [f"{stem.name}.png", f"{stem.name}.svg"]
