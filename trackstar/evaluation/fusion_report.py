"""What a search for a fusion found: tables, and the frontier of MRR against tail-patch.

Contract: as `report`; it takes the content of `fusion_run`'s results.json and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trackstar.evaluation.plots import FAINT, INK, drawing, save
from trackstar.evaluation.report import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def fusion_tables(results: Mapping[str, Any]) -> str:
    """The Markdown page."""
    about = results["about"]
    depth, step = about["depths"][-1], about["decided_by"]
    (lexical, influence), rules = results["parents"], results["rules"]
    chosen = _named(results, results["chosen"])
    shown = [lexical, influence, *_best_of_families(rules, chosen, step)]
    lines = [
        "# Fusion",
        "",
        f"Wanted: one list with the MRR of {about['lexical']} and the tail-patch@{depth} of {about['influence']} at "
        f"least. {len(rules)} rules were tried on {about['held_out']:,} held-out queries, where one was chosen by the "
        f"step {step!r}; the numbers below are of {about['evaluated']:,} other queries.",
        "",
        verdict(results),
        "",
        f"Tail-patch in percentage points under {step}. In brackets: {about['level']:.0%} bootstrap intervals over "
        "queries; differences are paired. Of each family the rule that stood best on held-out queries is shown.",
        "",
        *table(
            [
                "rule",
                "MRR",
                f"MRR less {about['lexical']}'s",
                f"tail-patch@{depth}",
                f"tail-patch@{depth} less {about['influence']}'s",
                "at least both",
            ],
            [_row(item, depth, step, item is chosen) for item in shown],
        ),
    ]
    names = [one["name"] for one in about["steps"]]
    lines += ["", f"## {chosen['name']} under every step", ""]
    depths = about["depths"]
    head = ["step", "list", *(f"tail-patch@{one}" for one in depths), f"@{depth} less {about['influence']}'s"]
    rows = []
    for name in names:
        for item in (lexical, influence, chosen):
            found = item["evaluated"]["steps"][name]
            cells = [_points(found[f"probability_at_{one}"]) for one in depths]
            rows.append([name, item["name"], *cells, _points(found["against_influence"][f"probability_at_{depth}"])])
    lines += table(head, rows)
    lines += ["", "## How many rules reach both", ""]
    lines += table(
        ["step", "held-out queries", "evaluated queries", "both"],
        [
            [
                name,
                *(str(sum(item[part]["at_least_both"][name] for item in rules)) for part in ("held_out", "evaluated")),
                str(
                    sum(
                        item["held_out"]["at_least_both"][name] and item["evaluated"]["at_least_both"][name]
                        for item in rules
                    )
                ),
            ]
            for name in names
        ],
    )
    return "\n".join(lines) + "\n"


def verdict(results: Mapping[str, Any]) -> str:
    """Whether a rule reaches both, in a sentence or two."""
    about, chosen = results["about"], _named(results, results["chosen"])
    step = about["decided_by"]
    if not any(item["held_out"]["at_least_both"][step] for item in results["rules"]):
        return f"No rule reaches both on the held-out queries; {chosen['name']!r} comes closest."
    reached = chosen["evaluated"]["at_least_both"][step]
    return f"Chosen: {chosen['name']!r}. On the evaluated queries it {'reaches' if reached else 'does not reach'} both."


def _best_of_families(
    rules: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any], step: str
) -> list[Mapping[str, Any]]:
    best: dict[str, Mapping[str, Any]] = {}
    for item in rules:
        known = best.get(item["family"])
        if item is chosen or known is None or (known is not chosen and _standing(item, step) > _standing(known, step)):
            best[item["family"]] = item
    return list(best.values())


def _standing(item: Mapping[str, Any], step: str) -> float:
    standing: float = item["held_out"]["standing"][step]
    return standing


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
    curves = list(dict.fromkeys(item["curve"] for item in rules))
    colours = {curve: mpl.colormaps["tab20"](number % 20) for number, curve in enumerate(curves)}
    figure = Figure(figsize=(4.4 * len(names) + 2.4, 4.6), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]

    def place(item: Mapping[str, Any], step: str) -> tuple[float, float]:
        found = item["evaluated"]
        return found["mrr"]["mean"], 100 * found["steps"][step][f"probability_at_{depth}"]["mean"]

    for panel, step in zip(panels, names, strict=True):
        for curve in curves:
            points = [place(item, step) for item in rules if item["curve"] == curve]
            panel.plot(*zip(*points, strict=True), "o-", color=colours[curve], ms=3, linewidth=0.8, label=curve)
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
