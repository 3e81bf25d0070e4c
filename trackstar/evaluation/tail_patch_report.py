"""What tail-patch found: numbers by method, step and group, tables, and a plot with a panel for each step.

Contract: as `report`. One table for each step, because none is a neutral judge (`tail_patch_judge`). Tables show the
change of the target's probability in percentage points; results.json holds it as it is, and the change of the loss in
nats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trackstar.evaluation.intervals import Bootstrap
from trackstar.evaluation.patching import Measured
from trackstar.evaluation.plots import FAINT, LINE, drawing, save
from trackstar.evaluation.report import TABLE_QUERIES, TABLE_RELATIONS, Grouping, numbers, parted
from trackstar.evaluation.tables import table
from trackstar.evaluation.tail_patch_judge import Lists, judgement

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TITLES = {"bucket": "frequency", "prediction": "the model's own answer", "relation": "relation", "task": "task"}


def measure_names(depths: Sequence[int]) -> list[str]:
    """Names of the measures, in the order of `values_of`."""
    return [f"{kind}_at_{depth}" for kind in ("probability", "loss") for depth in depths]


def values_of(
    measured: Measured, step: str, texts: Sequence[Sequence[str]], depths: Sequence[int]
) -> NDArray[np.float64]:
    """Mean changes over each list's first passages, float64 [Q, M]."""
    found = [judgement(step, "", depth, measured.effects[step], texts) for depth in depths]
    return np.stack([*(one.probability_Q for one in found), *(one.loss_Q for one in found)], axis=1)


def summarise_patches(
    measured: Measured,
    lists: Lists,
    groups: Sequence[Grouping],
    bootstrap: Bootstrap,
    depths: Sequence[int],
    compare: Sequence[tuple[str, str]] = (),
) -> dict[str, Any]:
    """The part of results.json: every method under every step, overall, by group, and against the first method.

    Args:
        measured: the effects.
        lists: texts by method, in the order of the measured queries.
        groups: of those queries.
        bootstrap: how intervals are made.
        depths: how many of a list's first passages count.
        compare: pairs of methods whose difference is measured, the first less the second.
    """
    names = measure_names(depths)
    methods: list[dict[str, Any]] = [{"name": name, "steps": []} for name in lists]
    for step in measured.steps:
        first_QM: NDArray[np.float64] | None = None
        for item, texts in zip(methods, lists.values(), strict=True):
            values_QM = values_of(measured, step, texts, depths)
            first_QM = values_QM if first_QM is None else first_QM
            item["steps"].append(
                {
                    "step": step,
                    **parted(values_QM, groups, bootstrap, names),
                    "against_first": numbers(values_QM - first_QM, bootstrap, names),
                }
            )
    comparisons = [
        {
            "of": one,
            "from": other,
            "steps": [
                numbers(
                    values_of(measured, step, lists[one], depths) - values_of(measured, step, lists[other], depths),
                    bootstrap,
                    names,
                )
                for step in measured.steps
            ],
        }
        for one, other in compare
    ]
    return {
        "queries": len(measured.queries),
        "depths": list(depths),
        "level": bootstrap.level,
        "model_digest": measured.model,
        "pairs": sum(len(known) for known in next(iter(measured.effects.values()))),
        "steps": [{"name": name, "settings": step.model_dump(mode="json")} for name, step in measured.steps.items()],
        "methods": methods,
        "comparisons": comparisons,
    }


def patch_tables(section: Mapping[str, Any]) -> list[str]:
    """Markdown tables, one for each step and one for each of its groups."""
    depths, methods = section["depths"], section["methods"]
    deepest = f"probability_at_{depths[-1]}"
    lines = [
        f"Mean change of the target's probability over {section['queries']:,} queries, in percentage points, after one "
        "step on each of a list's first passages, each from the final checkpoint. No step is a neutral judge: one that "
        "divides by the second moment shares its geometry with rows that do.",
        f"In brackets: {section['level']:.0%} bootstrap intervals over queries.",
    ]
    for number, step in enumerate(section["steps"]):
        parts = [(item["name"], item["steps"][number]) for item in methods]
        head = ["method", *(f"tail-patch@{depth}" for depth in depths), f"loss@{depths[-1]} (nats)"]
        rows = [
            [
                name,
                *(_points(part["overall"][f"probability_at_{depth}"]) for depth in depths),
                _nats(part["overall"][f"loss_at_{depths[-1]}"]),
            ]
            for name, part in parts
        ]
        lines += ["", f"### {step['name']}", "", *table(head, rows)]
        for group, title in _TITLES.items():
            found = parts[0][1]["by"].get(group, [])
            if group == "relation":
                found = [one for one in found if one["queries"] >= TABLE_QUERIES][:TABLE_RELATIONS]
            if not found:
                continue
            head = ["method", *(f"{one['label']} ({one['queries']:,})" for one in found)]
            rows = [
                [name, *(f"{100 * one[deepest]['mean']:+.3f}" for one in part["by"][group][: len(found)])]
                for name, part in parts
            ]
            lines += ["", f"Tail-patch@{depths[-1]} by {title}, numbers of queries in parentheses:", ""]
            lines += table(head, rows)
    if pairs := section.get("comparisons"):
        head = ["paired difference", *(step["name"] for step in section["steps"])]
        rows = [
            [f"{pair['of']} - {pair['from']}", *(_points(found[deepest]) for found in pair["steps"])] for pair in pairs
        ]
        lines += ["", f"### Paired differences of tail-patch@{depths[-1]}", "", *table(head, rows)]
    return lines


def draw_patches(section: Mapping[str, Any], folder: Path) -> list[str]:
    """Write tail-patch.png and .svg; returns their names."""
    with drawing():
        return save(_figure(section), folder / "tail-patch")


def _figure(section: Mapping[str, Any]) -> Figure:
    from matplotlib.figure import Figure

    methods, steps, depth = section["methods"], section["steps"], section["depths"][-1]
    figure = Figure(figsize=(3.2 * len(steps) + 2.2, 0.34 * len(methods) + 1.5), layout="constrained")
    panels = figure.subplots(1, len(steps), sharey=True, squeeze=False)[0]
    places = np.arange(len(methods))
    for number, (panel, step) in enumerate(zip(panels, steps, strict=True)):
        found = [item["steps"][number]["overall"][f"probability_at_{depth}"] for item in methods]
        means = np.array([item["mean"] for item in found])
        ends = np.array([[item["mean"] - item["low"], item["high"] - item["mean"]] for item in found]).T
        panel.axvline(0, color=LINE, linewidth=0.6)
        panel.errorbar(
            100 * means, places, xerr=100 * ends.clip(min=0), fmt="o", color=LINE, ecolor=LINE, capsize=3, ms=5
        )
        for mean, place in zip(means, places, strict=True):
            panel.annotate(
                f"{100 * mean:+.3f}",
                (100 * mean, place),
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=7.5,
            )
        panel.set_title(step["name"], fontsize=10)
        panel.grid(color=FAINT, linewidth=0.5)
        panel.set_axisbelow(True)
        panel.tick_params(axis="y", length=0)
        for side in ("top", "right", "left"):
            panel.spines[side].set_visible(False)
    panels[0].set_yticks(places, [item["name"] for item in methods])
    panels[0].set_ylim(len(methods) - 0.4, -0.6)
    figure.supxlabel(
        f"tail-patch@{depth}: change of the target's probability in percentage points, mean over "
        f"{section['queries']:,} queries; bars: {section['level']:.0%} bootstrap intervals",
        fontsize=8,
    )
    return figure


def _points(found: Mapping[str, float]) -> str:
    mean, low, high = (f"{100 * found[name]:+.3f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _nats(found: Mapping[str, float]) -> str:
    mean, low, high = (f"{found[name]:+.4f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"
