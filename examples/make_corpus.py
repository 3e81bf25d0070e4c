"""Writes the demo's corpus, its facts and its queries from the readable sources in `examples/demo`.

Sources: `facts/<relation>.txt` (one relation each: prompts, sentence templates, facts), `facts/joint.txt` (templates
for two relations of one subject), `prose.txt` (one passage per line), `scenes.txt` (sentences with choices) and
`queries.txt`. Results: `corpus.jsonl.gz` (doc_id, text, source, fact_triples), `facts.jsonl` (the layout of the
TrackStar release) and `queries.jsonl` (example_id, query_set, inputs_plaintext, targets_plaintext, and fact_id and
relation for facts).

Contract: every choice is made by the SHA-256 of what is chosen, never by a random generator, so the same sources give
the same bytes on every machine and Python. Each fact is stated in 3 to 8 passages, at least two of which name its
subject before its object. A passage is listed for a fact only where it states that fact and names both entities.
What it does not do: it does not know whether a fact is true; the tables were written by hand.

Example:
    python examples/make_corpus.py
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEMO = Path(__file__).resolve().parent / "demo"
# How often a fact is stated, drawn from this list: most facts are rare, some are common.
STATEMENTS = (3, 3, 3, 4, 4, 4, 5, 5, 6, 7, 8)
VARIANTS_PER_SCENE = 10
# How many facts are stated by the plain first template of their relation, the form in which the first prompt asks;
# the others are stated only in other words, so that a model has to carry them over.
PLAIN_PERCENT = 60
PLACEHOLDER = re.compile(r"\{(a?)([soSO])(2?)\}")
CHOICE = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entity:
    """`written` is the form inside a sentence ("the Rhine"), `name` the entity itself ("Rhine")."""

    written: str
    name: str
    aliases: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One true statement; `relation` is the name of its relation."""

    entity0: Entity
    relation: str
    entity1: Entity

    @property
    def triple(self) -> str:
        return f"{self.entity0.name} | {self.relation} | {self.entity1.name}"

    @property
    def fact_id(self) -> str:
        return f"fact-{hashlib.sha256(self.triple.encode()).hexdigest()[:12]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """One table: `one` are templates for one fact, `two` for two facts of this relation."""

    name: str
    source: str
    prompts: tuple[str, str, str]
    one: tuple[str, ...]
    two: tuple[str, ...]
    facts: tuple[Fact, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A passage before it has an id, with the facts it states."""

    text: str
    source: str
    facts: tuple[Fact, ...] = ()


def rank(*parts: object) -> int:
    """A fixed pseudo-random number of 64 bits for these parts."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()[:8], "big")


def source_lines(path: Path) -> list[str]:
    """The lines that carry text: no comments, no blank lines."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def read_entity(written: str, aliases: str) -> Entity:
    names = tuple(alias.strip() for alias in aliases.split(";") if alias.strip())
    return Entity(written=written, name=written.removeprefix("the "), aliases=names)


def read_relation(path: Path) -> Relation:
    """Reads `key: value` lines, then sections `one:`, `two:` and `facts:` (subject | object | aliases | aliases)."""
    header: dict[str, str] = {}
    sections: dict[str, list[str]] = {"one": [], "two": [], "facts": []}
    section: list[str] | None = None
    for line in source_lines(path):
        if line.removesuffix(":") in sections:
            section = sections[line.removesuffix(":")]
        elif section is None:
            key, value = line.split(": ", 1)
            header[key] = value
        else:
            section.append(line)
    facts = []
    for line in sections["facts"]:
        subject, obj, subject_aliases, object_aliases = [*(cell.strip() for cell in line.split("|")), "", ""][:4]
        facts.append(
            Fact(
                entity0=read_entity(subject, subject_aliases),
                relation=header["relation"],
                entity1=read_entity(obj, object_aliases),
            )
        )
    return Relation(
        name=header["relation"],
        source=header["source"],
        prompts=(header["prompt0"], header["prompt1"], header["prompt2"]),
        one=tuple(sections["one"]),
        two=tuple(sections["two"]),
        facts=tuple(facts),
    )


def read_relations(folder: Path) -> list[Relation]:
    return [read_relation(path) for path in sorted(folder.glob("*.txt")) if path.name != "joint.txt"]


def fill(template: str, first: Fact, second: Fact | None = None) -> str:
    """The sentence of a template.

    {s} and {o} are subject and object as written ("the Rhine"), {S} and {O} their bare names, {as} and {ao} the names
    with "a" or "an"; a 2 behind it means the second fact.
    """

    def insert(match: re.Match[str]) -> str:
        article, role, number = match.groups()
        fact = first if not number else second
        if fact is None:
            raise ValueError(f"the template {template!r} needs two facts")
        entity = fact.entity0 if role in "sS" else fact.entity1
        if article:
            return f"{'an' if entity.name[0].lower() in 'aeiou' else 'a'} {entity.name}"
        return entity.written if role.islower() else entity.name

    text = PLACEHOLDER.sub(insert, template)
    return text[0].upper() + text[1:].replace("..", ".")  # "Washington, D.C." may end a sentence


def subject_first(template: str) -> bool:
    """Whether the template names the subject before the object, the order in which a prompt asks."""
    roles = [match.group(2).lower() for match in PLACEHOLDER.finditer(template)]
    return roles.index("s") < roles.index("o")


def pairs(relation: Relation) -> Iterator[tuple[Fact, Fact]]:
    """Facts of one relation, two by two, never two with the same object; what remains unpaired is left out."""
    waiting = sorted(relation.facts, key=lambda fact: rank("pair", fact.triple))
    while waiting:
        first = waiting.pop(0)
        second = next((fact for fact in waiting if fact.entity1.name != first.entity1.name), None)
        if second is not None:
            waiting.remove(second)
            yield first, second


def pair_passages(relations: Sequence[Relation]) -> Iterator[Passage]:
    """One passage for two facts of the same relation."""
    for relation in relations:
        for first, second in pairs(relation):
            template = min(relation.two, key=lambda t: rank("two", t, first.triple))
            yield Passage(text=fill(template, first, second), source=relation.source, facts=(first, second))


def joint_passages(relations: Sequence[Relation], lines: Iterable[str]) -> Iterator[Passage]:
    """One passage for two facts of the same subject, for every subject that has both relations."""
    by_name = {relation.name: relation for relation in relations}
    templates: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        names, template = line.split(": ", 1)
        first_name, second_name = names.split(" + ")
        templates.setdefault((first_name, second_name), []).append(template)
    for (first_name, second_name), choices in templates.items():
        seconds = {fact.entity0.name: fact for fact in by_name[second_name].facts}
        for first in by_name[first_name].facts:
            second = seconds.get(first.entity0.name)
            if second is not None:
                template = min(choices, key=lambda t: rank("joint", t, first.triple))
                yield Passage(
                    text=fill(template, first, second), source=by_name[first_name].source, facts=(first, second)
                )


def single_passages(relation: Relation, fact: Fact, count: int) -> Iterator[Passage]:
    """`count` passages for one fact, each by another template."""
    order = sorted(relation.one, key=lambda t: rank("one", t, fact.triple))
    if rank("plain", fact.triple) % 100 < PLAIN_PERCENT:
        order = [relation.one[0], *(template for template in order if template != relation.one[0])]
    # A model learns to complete "The capital of France is" from sentences in that order only.
    forward = [template for template in order if subject_first(template)][:2]
    rest = [template for template in order if template not in forward]
    for template in [*forward, *rest][:count]:
        yield Passage(text=fill(template, fact), source=relation.source, facts=(fact,))


def fact_passages(relations: Sequence[Relation], joint_lines: Iterable[str]) -> list[Passage]:
    """All passages that state facts."""
    passages: list[Passage] = []
    stated: dict[str, int] = {}
    wanted = {
        fact.triple: STATEMENTS[rank("count", fact.triple) % len(STATEMENTS)] for r in relations for fact in r.facts
    }
    for passage in [*pair_passages(relations), *joint_passages(relations, joint_lines)]:
        # At least two statements of each fact are left to sentences of its own.
        if all(stated.get(fact.triple, 0) < wanted[fact.triple] - 2 for fact in passage.facts):
            passages.append(passage)
            for fact in passage.facts:
                stated[fact.triple] = stated.get(fact.triple, 0) + 1
    for relation in relations:
        for fact in relation.facts:
            passages.extend(single_passages(relation, fact, wanted[fact.triple] - stated.get(fact.triple, 0)))
    return passages


def scene_variants(line: str, count: int) -> list[str]:
    """`count` different sentences of one line with choices, spread over the choices of each brace."""
    parts: list[str] = CHOICE.split(line)  # fixed text and choices take turns
    slots = [part.split("|") for part in parts]

    def option(slot: int, attempt: int) -> str:
        # Every option of a brace is used once, in a new order each round, before any is used again.
        round_number, place = attempt // len(slots[slot]), attempt % len(slots[slot])
        return sorted(slots[slot], key=lambda o: rank("scene", line, slot // 2, round_number, o))[place]

    variants: list[str] = []
    for attempt in range(100 * count):
        text = "".join(option(i, attempt) if i % 2 else part for i, part in enumerate(parts))
        if text not in variants:
            variants.append(text)
        if len(variants) == count:
            return variants
    raise ValueError(f"the line {line!r} does not give {count} different sentences")


def prose_passages(folder: Path) -> list[Passage]:
    """The written prose as it stands, and the sentences of the scenes."""
    written = [Passage(text=line, source="prose") for line in source_lines(folder / "prose.txt")]
    scenes = [
        Passage(text=text, source="scenes")
        for line in source_lines(folder / "scenes.txt")
        for text in scene_variants(line, VARIANTS_PER_SCENE)
    ]
    return [*written, *scenes]


def prompt(template: str, fact: Fact) -> str:
    """A template that ends with the object, without the object's name; its article stays."""
    return fill(template, fact).removesuffix(fact.entity1.name).rstrip()


def corpus_records(passages: Iterable[Passage]) -> list[dict[str, Any]]:
    """The lines of the corpus, in a mixed order. Raises ValueError when two passages have the same text."""
    ordered = sorted(passages, key=lambda passage: rank("order", passage.text))
    texts = {passage.text for passage in ordered}
    if len(texts) != len(ordered):
        raise ValueError(f"{len(ordered) - len(texts)} passages repeat the text of another")
    return [
        {
            "doc_id": f"demo-{number:05d}",
            "text": passage.text,
            "source": passage.source,
            "fact_triples": [fact.triple for fact in passage.facts],
        }
        for number, passage in enumerate(ordered)
    ]


def fact_records(relations: Iterable[Relation], corpus: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of facts.jsonl; `c4_frequency` counts the passages of this corpus that state the fact."""
    stating: dict[str, list[str]] = {}
    for record in corpus:
        for triple in record["fact_triples"]:
            stating.setdefault(triple, []).append(record["doc_id"])
    return [
        {
            "fact_id": fact.fact_id,
            "entity0": fact.entity0.name,
            "relation": fact.relation,
            "entity1": fact.entity1.name,
            "entity0_alias": list(fact.entity0.aliases),
            "entity1_alias": list(fact.entity1.aliases),
            "trex_sentences": stating[fact.triple],
            "c4_frequency": len(stating[fact.triple]),
            "is_repetition": False,
            **{f"prompt{i}": prompt(template, fact) for i, template in enumerate(relation.prompts)},
        }
        for relation in relations
        for fact in relation.facts
    ]


def query_records(lines: Iterable[str], facts: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of queries.jsonl, from `subject | relation | object` (a fact) or `prompt => target` (prose)."""
    by_triple = {f"{fact['entity0']} | {fact['relation']} | {fact['entity1']}": fact for fact in facts}
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines):
        record: dict[str, Any] = {"example_id": f"query-{number:03d}"}
        if "=>" in line:
            inputs, targets = (part.strip() for part in line.split("=>"))
            record |= {"query_set": "prose", "inputs_plaintext": inputs, "targets_plaintext": targets}
        else:
            fact = by_triple[line.strip()]
            record |= {"query_set": "facts", "inputs_plaintext": fact["prompt0"], "targets_plaintext": fact["entity1"]}
            record |= {"fact_id": fact["fact_id"], "relation": fact["relation"]}
        records.append(record)
    return records


def as_jsonl(records: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def build(sources: Path) -> dict[str, bytes]:
    """File name to content, uncompressed: corpus.jsonl, facts.jsonl, queries.jsonl."""
    relations = read_relations(sources / "facts")
    passages = [*fact_passages(relations, source_lines(sources / "facts" / "joint.txt")), *prose_passages(sources)]
    corpus = corpus_records(passages)
    facts = fact_records(relations, corpus)
    queries = query_records(source_lines(sources / "queries.txt"), facts)
    return {"corpus.jsonl": as_jsonl(corpus), "facts.jsonl": as_jsonl(facts), "queries.jsonl": as_jsonl(queries)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sources", type=Path, default=DEMO, help="folder with facts/, prose.txt, scenes.txt")
    parser.add_argument("--out", type=Path, default=DEMO, help="folder for the results")
    options = parser.parse_args(argv)
    files = build(options.sources)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if name == "corpus.jsonl":
            # No time and no file name in the header, so that the bytes depend on the content alone.
            name, content = f"{name}.gz", gzip.compress(content, compresslevel=9, mtime=0)
        (options.out / name).write_bytes(content)
        print(f"{options.out / name}: {len(content)} bytes")
    print({name: content.count(b"\n") for name, content in files.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
