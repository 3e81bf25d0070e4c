"""What people see: tables of proponents and opponents, and what an index holds.

Contract: answers go to the console given. Nothing relies on colour: on a terminal the words that carry a score are
bold, and the words against it struck through; elsewhere they stand in [brackets] and (parentheses). Text of a corpus is
shown as text: neither Rich's markup nor a terminal's control codes in it have any effect.

It decides nothing and reads no files; `records` is the same for machines, `shading` finds the words to mark.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from trackstar.shading import Mark, excerpt, mark_words

if TYPE_CHECKING:
    from trackstar.audit_record import Audit
    from trackstar.results import Influence, Trace

CARRIES = "bold green"
AGAINST = "dim strike"
_EXCERPT_CHARACTERS = 320
_COST_GROUPS = {
    "disk": "On disk or in the object store",
    "memory": "In memory of encoders and rerankers",
    "milvus": "In Milvus",
    "query": "A query",
    "build": "Building it",
    "machines": "Machines",
    "later": "Later",
}
# C0 and C1 control characters and the marks that turn the direction of text.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def plain(text: str) -> str:
    """Text of a corpus on one line, without anything that a terminal would obey; as many characters as before."""
    return _CONTROL.sub(lambda found: " " if found[0] in "\t\n\r\v\f" else "\N{REPLACEMENT CHARACTER}", text)


def shaded(text: str, marks: Sequence[Mark], *, styles: bool, width: int = _EXCERPT_CHARACTERS) -> Text:
    """The text around its strongest words, these set off by style or, without `styles`, by brackets."""
    start, end = excerpt(text, marks, width)
    clean = plain(text)
    shown = Text("… " if start else "")
    position = start
    for mark in marks:
        if mark.start < position or mark.end > end:
            continue
        shown.append(clean[position : mark.start])
        word = clean[mark.start : mark.end]
        if styles:
            shown.append(word, style=CARRIES if mark.carries else AGAINST)
        else:
            shown.append(f"[{word}]" if mark.carries else f"({word})")
        position = mark.end
    shown.append(clean[position:end])
    return shown.append(" …") if end < len(text) else shown


def influence_table(title: str, influences: Sequence[Influence], *, styles: bool) -> Table:
    """Rank, score, z-score, document and shaded text of every passage."""
    table = Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("z", justify="right", no_wrap=True)
    table.add_column("document", max_width=24, overflow="fold")
    table.add_column("text", ratio=1, overflow="fold")
    for item in influences:
        passage = item.passage
        document = Text(plain(passage.doc_id))
        if passage.source and not passage.doc_id.startswith(passage.source):
            document.append(f"\n{plain(passage.source)}", style="dim")
        marks = mark_words(passage.text, item.evidence.tokens, item.score) if item.evidence else []
        table.add_row(
            str(item.rank),
            f"{item.score:+.4f}",
            f"{item.z_score:+.1f}",
            document,
            shaded(passage.text, marks, styles=styles),
        )
    return table


def print_trace(console: Console, trace: Trace, *, prediction: str | None = None) -> None:
    """One answer: the query, what the model makes of it, proponents, opponents, and what the numbers mean."""
    styles = console.is_terminal
    head = Table.grid(padding=(0, 2))
    head.add_row("prompt", Text(plain(trace.query.prompt)))
    head.add_row("target", Text(plain(trace.query.target), style="bold"))
    head.add_row("", f"loss {trace.loss:.3f} nats, probability {math.exp(-trace.loss):.3g}")
    if prediction is not None:
        head.add_row("model says", Text(plain(prediction) or "(nothing)"))
    proponents = influence_table(
        "Proponents: passages that pushed the model towards the target", trace.proponents, styles=styles
    )
    parts: list[Any] = [head, Text(), proponents]
    if trace.opponents:
        parts += [
            Text(),
            influence_table("Opponents: passages that pushed it away", trace.opponents, styles=styles),
        ]
    parts.append(Text(_legend(trace, styles), style="dim"))
    console.print(Group(*parts), highlight=False)


def _legend(trace: Trace, styles: bool) -> str:
    how = "every passage was scored" if trace.exact else f"{trace.examined:,} candidates were scored exactly"
    lines = [
        "score: cosine of the whitened gradients; z: its distance from the mean of a random sample of passages "
        f"({trace.background_mean:+.2g}), in standard deviations ({trace.background_std:.2g})",
        f"generation {trace.generation}; {how}; {sum(trace.seconds.values()):.2f} s",
    ]
    if any(item.evidence for item in (*trace.proponents, *trace.opponents)):
        words = ("bold", "struck through") if styles else ("[in brackets]", "(in parentheses)")
        what = f"text: where half of the score comes from is {words[0]}, what is as strong against it {words[1]}"
        lines.insert(1, f"{what}; often the place just before the word that was learned")
    return "\n".join(lines)


def fact_table(rows: Iterable[tuple[str, str]], title: str | None = None) -> Table:
    """Names and values in two columns."""
    table = Table(
        title=None if title is None else Text(title, style="bold"),
        title_justify="left",
        box=None,
        show_header=False,
        pad_edge=False,
        padding=(0, 3, 0, 0),
    )
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(plain(value)))
    return table


def bytes_text(size: float) -> str:
    """A number of bytes in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if size < 1024 or unit == "PiB":
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


def print_summary(console: Console, facts: dict[str, Any]) -> None:
    """What an index holds, as `describe.describe_index` tells it, with the generation that answers."""
    console.print(fact_table(_summary_rows(facts)))


def print_generations(console: Console, facts: dict[str, Any]) -> None:
    """Every generation of an index that does not answer."""
    for item in facts["generations"]:
        if not item["active"]:
            console.print()
            console.print(
                fact_table(
                    [("generation", _generation_title(item)), *_generation_rows(item, facts["rows"]["passages"])]
                )
            )


def _summary_rows(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What an index holds, as names and values."""
    rows, projection, moments = facts["rows"], facts["projection"], facts["moments"]
    states = {
        "complete": "complete",
        "rows": "all passages are encoded, no generation answers yet; give the index command again",
        "encoding": f"unfinished, {rows['shards']} shards of {facts['shard_passages']:,} passages are encoded; "
        "give the index command again",
    }
    yield "index", f"{facts['path']}: {states[facts['state']]}"
    model = facts["model"]
    yield "model", f"{model['architecture']}, {model['parameters']:,} parameters, digest {model['digest'][:12]}"
    yield "", model["path"]
    corpus = facts["corpus"]
    yield "corpus", f"{', '.join(corpus['paths'])}, fingerprint {corpus['fingerprint'][:12]}"
    yield "passages", f"{rows['passages']:,}, {rows['tokens']:,} tokens, windows of {facts['window_tokens']:,}"
    first = facts["blocks"][0]
    yield (
        "rows",
        f"d = {facts['dim']:,} in {facts['row_dtype']}: {len(facts['blocks'])} blocks of {first['rows']} x "
        f"{first['cols']} ({projection['layer_blocks']} x attention and MLP, seed {projection['seed']})",
    )
    fit = moments["fit"]
    how = "exact" if moments["exact"] else f"rank {moments['rank']}"
    error = f", relative squared error {fit['mean']:.3g} on average, {fit['worst']:.3g} at worst" if fit else ""
    if fit and not fit["worst"]:
        how, error = "factored, which folds in exactly", ""
    yield "moments", "none" if moments["source"] == "none" else f"{moments['source']}, {how}{error}"
    for item in facts["generations"]:
        if item["active"]:
            yield "generation", _generation_title(item)
            yield from _generation_rows(item, rows["passages"])
    sizes = facts["bytes"]
    parts = ", ".join(f"{name} {bytes_text(sizes[name])}" for name in ("rows", "statistics", "generations"))
    yield "on disk", f"{bytes_text(sizes['total'])} ({parts})"


def _generation_title(item: dict[str, Any]) -> str:
    state = "active" if item["active"] else "finished" if item["finished"] else "unfinished"
    if item["retired"]:
        state = "retired"
    return f"{item['name']} ({state}, {bytes_text(item['bytes'])})"


def _generation_rows(item: dict[str, Any], num_passages: int) -> Iterator[tuple[str, str]]:
    if not item["finished"]:
        return
    mix, code = item["mix"], item["code"]
    share = f"lambda = {item['weight']:.3f} ({'crossing rule' if mix['weight'] == 'crossing' else 'fixed'})"
    kinds = {
        "train": "R of the corpus",
        "task": f"R of the corpus and of task queries, {share}",
        "none": "no whitening",
    }
    damping = "" if mix["kind"] == "none" else f", damping {mix['damping']:g} of the mean eigenvalue"
    yield "mix", f"{kinds[mix['kind']]}{damping}"
    unit = "floats" if code["kind"] == "prefix" else "sign bits"
    yield "code", f"{code['size']:,} {unit} in {code['store']}"
    yield "background", f"{min(item['background'], num_passages):,} passages"
    if item["audit"] is not None:
        audit = item["audit"]
        passed = "passed" if audit["passed"] else "failed"
        yield "audit", f"{passed}, recall@{audit['k']} {audit['recall']:.3f} with {audit['candidates']:,} candidates"


def print_plan(console: Console, content: dict[str, Any]) -> None:
    """A plan: the projection, the codes that were weighed with the law they follow, and every cost with its formula."""
    model, projection, target, code = (content[name] for name in ("model", "projection", "target", "code"))
    assumed = " (assumed; give --model DIR for yours)" if model["assumed"] else ""
    facts = [
        ("corpus", f"{content['passages']:,} passages of {content['tokens_per_passage']:g} tokens"),
        ("model", f"{model['layers']} layers, {model['parameters']:,} parameters{assumed}"),
        ("projection", projection["explanation"]),
        (
            "coarse code",
            code["explanation"] + ("" if code["meets_target"] else "; no code reaches the recall asked for"),
        ),
    ]
    console.print(fact_table(facts))
    table = Table(title=Text("\nCodes", style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "kind", "size k", "bytes", "sigma", "candidates L", "recall"):
        table.add_column(name, justify="left" if name in ("", "kind") else "right", no_wrap=True)
    for item in content["options"]:
        numbers = (f"{item['size']:,}", f"{item['code_bytes']:,}", f"{item['sigma']:.5f}", f"{item['candidates']:,}")
        table.add_row(">" if item == code else "", item["kind"], *numbers, f"{item['recall']:.3f}")
    console.print(table)
    law = (
        f"sigma: prefix sqrt(1/k - 1/d), bits sqrt((pi/2)^2/k - 1/d), d = {projection['dim']:,}\n"
        f"recall: Phi(s/sigma - Phi^-1(1 - L/N)), s = {target['score']:g}, N = {content['passages']:,}; "
        f"L is the least that reaches {target['recall']:g}, within what one search can return"
    )
    console.print(Text(law, style="dim"))
    for group, title in _COST_GROUPS.items():
        print_costs(console, title, [item for item in content["costs"] if item["group"] == group])


def print_costs(console: Console, title: str, costs: Sequence[dict[str, Any]]) -> None:
    """Figures of one kind, each with its formula."""
    table = Table(title=Text(f"\n{title}", style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("what", min_width=24, overflow="fold")
    table.add_column("how much", justify="right", no_wrap=True)
    table.add_column("formula", ratio=1, overflow="fold")
    for item in costs:
        value = bytes_text(item["value"]) if item["unit"] == "bytes" else _quantity(item["value"], item["unit"])
        table.add_row(item["name"], value, item["formula"])
    console.print(table)


def print_audit(console: Console, audit: Audit) -> None:
    """What an audit found, and what it makes of it."""
    asked = f"{audit.queries:,} queries, both ends, {audit.candidates:,} candidates of {audit.num_passages:,} passages"
    bits = f", {audit.bits_differing:,} single bits" if audit.bits_differing else ""
    rows = [
        ("generation", f"{audit.generation}, its codes in {audit.coarse}"),
        (
            f"recall@{audit.k}",
            f"{audit.recall:.3f} ({audit.recall_opponents:.3f} of opponents) of the exact ranking; the noise law "
            f"expects {audit.expected_recall:.3f}, {audit.min_recall:g} is asked for",
        ),
        ("", asked),
        ("codes", f"{audit.num_codes:,} in the coarse index, {audit.num_passages:,} expected"),
        (
            "",
            f"{audit.codes_compared:,} computed again: {audit.codes_differing:,} codes differ{bits}, "
            f"{audit.norms_differing:,} norms",
        ),
        ("audit", "passed" if audit.passed else "failed"),
    ]
    console.print(fact_table(rows))


def _quantity(value: float, unit: str) -> str:
    return f"{value:,.0f} {unit}" if 100 <= value < 1e7 else f"{value:.3g} {unit}"
