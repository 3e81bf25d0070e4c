"""What a search for a fusion found: tables, and the frontier of MRR against tail-patch.

Contract: as `report`; it takes the content of `fusion_run`'s results.json and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trackstar.evaluation.plots import FAINT, INK, drawing, save
from trackstar.evaluation.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def standing(item: Mapping[str, Any], steps: Sequence[str]) -> float:
    """How a rule stands on held-out queries against both parents in the measure and step in which it does worst."""
    return min(float(item["held_out"]["standing"][step]) for step in steps)


def verdict(results: Mapping[str, Any]) -> str:
    """Whether a rule reaches both, in a sentence or two."""
    about, chosen = results["about"], _named(results, results["chosen"])
    name = chosen["name"]
    if all(standing(item, about["decided_by"]) < 0 for item in results["rules"]):
        first = f"No rule reaches both on the held-out queries; {name!r} comes closest."
    else:
        first = f"Chosen on the held-out queries, where it reaches both: {name!r}."
    reached = [step for step, both in chosen["evaluated"]["at_least_both"].items() if both]
    missed = [step for step, both in chosen["evaluated"]["at_least_both"].items() if not both]
    if not reached:
        return f"{first} On the evaluated queries it does not reach both under {_listed(missed)}."
    but = f", but not under {_listed(missed)}" if missed else ""
    return f"{first} On the evaluated queries it reaches both under {_listed(reached)}{but}."


def fusion_tables(results: Mapping[str, Any]) -> str:
    """The Markdown page."""
    about, rules = results["about"], results["rules"]
    depth, steps = about["depths"][-1], about["decided_by"]
    chosen = _named(results, results["chosen"])
    shown = [*results["parents"], *_best_of_families(rules, chosen, steps)]
    lines = [
        "# Fusion",
        "",
        f"Wanted: one list with the MRR of {about['lexical']} and the tail-patch@{depth} of {about['influence']} at "
        f"least. {len(rules)} rules were tried on {about['held_out']:,} held-out queries, where one was chosen by "
        f"{_listed(steps)}; the numbers below are of {about['evaluated']:,} other queries.",
        "",
        verdict(results),
        "",
        f"Tail-patch is in percentage points. In brackets: {about['level']:.0%} bootstrap intervals over queries; "
        "differences are paired. Of each family the rule that stood best on held-out queries is shown.",
    ]
    for step in (one["name"] for one in about["steps"]):
        head = [
            "rule",
            "MRR",
            f"less {about['lexical']}'s",
            f"tail-patch@{depth}",
            f"less {about['influence']}'s",
            "at least both",
        ]
        rows = [_row(item, depth, step, item is chosen) for item in shown]
        lines += ["", f"## {step}", "", *table(head, rows)]
        head = ["list", *(f"tail-patch@{one}" for one in about["depths"])]
        rows = []
        for item in (*results["parents"], chosen):
            found = item["evaluated"]["steps"][step]
            rows.append([item["name"], *(_points(found[f"probability_at_{one}"]) for one in about["depths"])])
        lines += ["", f"The chosen rule, {chosen['name']!r}, at every depth:", "", *table(head, rows)]
        counts = [sum(item[part]["at_least_both"][step] for item in rules) for part in ("held_out", "evaluated")]
        lines += [
            "",
            f"{counts[0]} rules reach both on the held-out queries, {counts[1]} on the evaluated ones.",
        ]
    return "\n".join(lines) + "\n"


def _listed(names: Sequence[str]) -> str:
    quoted = [repr(name) for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"


def _best_of_families(
    rules: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any], steps: Sequence[str]
) -> list[Mapping[str, Any]]:
    best: dict[str, Mapping[str, Any]] = {}
    for item in rules:
        known = best.get(item["family"])
        if item is chosen or known is None or (known is not chosen and standing(item, steps) > standing(known, steps)):
            best[item["family"]] = item
    return list(best.values())


def _row(item: Mapping[str, Any], depth: int, step: str, is_chosen: bool) -> list[str]:
    found = item["evaluated"]
    patch = found["steps"][step]
    return [
        f"**{item['name']}**" if is_chosen else item["name"],
        _plain(found["mrr"]),
        _plain(found["mrr_against_lexical"], signed=True),
        _points(patch[f"probability_at_{depth}"]),
        _points(patch["against_influence"][f"probability_at_{depth}"]),
        "yes" if found["at_least_both"][step] else "no",
    ]


def _plain(found: Mapping[str, float], *, signed: bool = False) -> str:
    mean, low, high = (f"{found[name]:{'+' if signed else ''}.3f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _points(found: Mapping[str, float]) -> str:
    mean, low, high = (f"{100 * found[name]:+.3f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _named(results: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(item for item in results["rules"] if item["name"] == name)
    return found


def draw_frontier(results: Mapping[str, Any], folder: Path) -> list[str]:
    """Write frontier.png and .svg; returns their names."""
    with drawing():
        return save(_figure(results), folder / "frontier")


def _figure(results: Mapping[str, Any]) -> Figure:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    about = results["about"]
    depth, names = about["depths"][-1], [one["name"] for one in about["steps"]]
    (lexical, influence), rules = results["parents"], results["rules"]
    chosen = _named(results, results["chosen"])
    curves = {item["curve"]: item["family"] for item in rules}
    families = list(dict.fromkeys(curves.values()))
    colours = {family: mpl.colormaps["tab10"](number) for number, family in enumerate(families)}
    figure = Figure(figsize=(4.4 * len(names) + 2.4, 4.6), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]

    def place(item: Mapping[str, Any], step: str) -> tuple[float, float]:
        found = item["evaluated"]
        return found["mrr"]["mean"], 100 * found["steps"][step][f"probability_at_{depth}"]["mean"]

    for panel, step in zip(panels, names, strict=True):
        for curve, family in curves.items():
            points = [place(item, step) for item in rules if item["curve"] == curve]
            colour = colours[family]
            panel.plot(*zip(*points, strict=True), "o-", color=colour, ms=3, linewidth=0.7, alpha=0.8)
        for family, colour in colours.items():
            panel.plot([], [], "o-", color=colour, ms=3, linewidth=0.7, label=family)
        for item, mark in ((lexical, "s"), (influence, "^")):
            across, up = place(item, step)
            panel.plot([across], [up], mark, color=INK, ms=8, label=item["name"], linestyle="none")
        across, up = place(chosen, step)
        label = f"chosen: {chosen['name']}"
        panel.plot([across], [up], "o", mfc="none", mec=INK, mew=1.6, ms=11, label=label, linestyle="none")
        panel.margins(0.08)
        (left, right), (bottom, top) = panel.get_xlim(), panel.get_ylim()
        least_mrr, least_patch = place(lexical, step)[0], place(influence, step)[1]
        panel.fill_between([least_mrr, right], least_patch, top, color=FAINT, zorder=0, label="at least both")
        panel.set_xlim(left, right)
        panel.set_ylim(bottom, top)
        panel.set_title(step, fontsize=10)
        panel.set_xlabel("MRR")
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    panels[0].set_ylabel(f"tail-patch@{depth}, percentage points")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=7.5, frameon=False)
    return figure
