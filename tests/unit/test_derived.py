"""What is built on an index that is there: another mix, more passages, fewer passages; and deletions before that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny
from trackstar.blobs import location
from trackstar.build import build_index, make_config
from trackstar.cli import main
from trackstar.errors import CorruptArtifact, Incompatible, InvalidRequest, NotFound, NotReady
from trackstar.generation import read_facts
from trackstar.index import Index
from trackstar.index_settings import settings_of
from trackstar.locks import writing
from trackstar.results import Query, Trace
from trackstar.retirement import bring_back, collect, garbage, retire
from trackstar.tombstones import NONE, Tombstones, delete_documents, read_deleted
from trackstar.tracer import Tracer

WORDS = ["river", "bridge", "snow", "hills", "night", "birds", "sang", "sea"]
QUERY = Query(prompt="The river runs to", target=" the sea", query_id="q")


def documents(first: int, count: int) -> str:
    texts = [
        " ".join(WORDS[(number * step) % len(WORDS)] for step in (1, 3, 5, 7)) for number in range(first, first + count)
    ]
    return "".join(json.dumps({"id": f"d{first + row}", "text": text}) + "\n" for row, text in enumerate(texts))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    tiny.save_model(tmp_path / "model", "gpt2")
    (tmp_path / "one.jsonl").write_text(documents(0, 13))
    (tmp_path / "two.jsonl").write_text(documents(13, 6))
    return tmp_path


def settings(root: Path, **changes: Any) -> dict[str, Any]:
    return {
        "corpus": {"paths": [str(root / "one.jsonl")]},
        "model": str(root / "model"),
        "projection": {"layer_blocks": 2, "rows": 4, "cols": 4},
        "code": {"kind": "bits", "size": 32, "store": "memory"},
        "background": 4,
        "shard_passages": 5,
        "row_dtype": "float32",
        **changes,
    }


def build(root: Path, out: str = "index", **changes: Any) -> str:
    generation = build_index(make_config(settings(root, **changes)), root / out)
    generation.close()
    return generation.name


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def traced(root: Path, out: str = "index", **options: Any) -> Trace:
    tracer = Tracer.open(str(root / out))
    try:
        return tracer.trace(QUERY, k=5, candidates=options.pop("candidates", 20), **options)
    finally:
        tracer.close()


def ids_of(trace: Trace) -> list[int]:
    return [item.passage.passage_id for item in (*trace.proponents, *trace.opponents)]


def more(root: Path) -> list[dict[str, Any]]:
    return [{"paths": [str(root / "two.jsonl")]}]


# --- another mix, another code -----------------------------------------------------------------------------------


def test_another_damping_codes_again_and_encodes_nothing(root: Path) -> None:
    first = build(root)
    rows = snapshot(root / "index" / "rows")
    (root / "model" / "model.safetensors").rename(root / "model" / "kept")
    (root / "model" / "kept").rename(root / "model" / "model.safetensors")
    second = build(root, mix={"damping": 0.5})
    assert first != second
    assert snapshot(root / "index" / "rows") == rows
    assert Index(root / "index").active() == second


# --- more passages -----------------------------------------------------------------------------------------------


def test_appended_passages_leave_old_files_alone_and_share_old_codes(root: Path) -> None:
    first = build(root)
    before = snapshot(root / "index")
    del before["active.json"]
    second = build(root, append=more(root))
    after = snapshot(root / "index")
    assert {name: after[name] for name in before} == before
    codes = root / "index" / "generations"
    for shard in range(3):
        files = [codes / name / "codes" / f"{shard:06d}.safetensors" for name in (first, second)]
        assert files[0].stat().st_ino == files[1].stat().st_ino  # the same file, not made again
    facts = read_facts(codes / second)
    assert (facts["parts"], facts["num_passages"], facts["num_codes"]) == (2, 19, 19)
    assert facts["statistics"] == read_facts(codes / first)["rows"]
    index = Index(root / "index")
    assert index.rows(first).num_passages == 13
    assert index.rows(second).num_passages == index.rows().num_passages == 19
    assert [passage.doc_id for passage in index.rows().passages([12, 13, 18])] == ["d12", "d13", "d18"]
    # Scores of old passages are the same numbers: W has not changed.
    tracer = Tracer.open(str(root / "index"), generation=first)
    old = {item.passage.passage_id: item.score for item in tracer.trace(QUERY, k=13, exact=True).proponents}
    tracer.close()
    tracer = Tracer.open(str(root / "index"))
    new = {item.passage.passage_id: item.score for item in tracer.trace(QUERY, k=19, exact=True).proponents}
    tracer.close()
    assert len(new) == 19
    assert {passage_id: new[passage_id] for passage_id in old} == old


def test_appending_in_one_go_gives_the_same_bytes(root: Path) -> None:
    build(root)
    build(root, append=more(root))
    name = build(root, "other", append=more(root))
    for folder in ("rows", f"generations/{name}"):
        assert snapshot(root / "index" / folder) == snapshot(root / "other" / folder)


def test_a_refit_is_what_a_build_from_scratch_has(root: Path) -> None:
    build(root)
    name = build(root, append=more(root), refit=True)
    assert read_facts(root / "index" / "generations" / name)["statistics"] == Index(root / "index").rows(name).digest
    (root / "both").mkdir()
    for file in ("one.jsonl", "two.jsonl"):
        (root / "both" / file).write_bytes((root / file).read_bytes())
    scratch = build(root, "scratch", corpus={"paths": [str(root / "both")]}, shard_passages=19)
    one, two = Index(root / "index").generation(name), Index(root / "scratch").generation(scratch)
    np.testing.assert_allclose(one.norms_N, two.norms_N, rtol=1e-5)
    one.close()
    two.close()


def test_another_corpus_for_a_part_is_refused(root: Path) -> None:
    build(root)
    name = build(root, append=more(root))
    (root / "two.jsonl").write_text(documents(40, 6))
    with pytest.raises(Incompatible, match=r"was started with append\.0\.fingerprint = .*, this command has"):
        build(root, append=more(root))
    assert Index(root / "index").active() == name


# --- fewer passages ----------------------------------------------------------------------------------------------


def test_deleted_documents_are_in_no_answer_at_once(root: Path) -> None:
    build(root)
    gone = ids_of(traced(root))[0]
    index = Index(root / "index")
    doc_id = index.rows().passages([gone])[0].doc_id
    deleted = delete_documents(index.root, index.rows(), [doc_id])
    assert deleted.passage_ids.tolist() == [gone]
    assert deleted.doc_ids == (doc_id,)
    for options in ({}, {"exact": True}, {"candidates": 5}):
        assert gone not in ids_of(traced(root, **options))
    # A later generation, that was not purged, shows it as little.
    build(root, append=more(root), mix={"damping": 0.3})
    assert gone not in ids_of(traced(root))
    again = delete_documents(index.root, index.rows(), [doc_id, "d0"])
    assert set(again.passage_ids.tolist()) == {gone, 0}


def test_deleting_what_is_not_there_deletes_nothing(root: Path) -> None:
    build(root)
    index = Index(root / "index")
    with pytest.raises(NotFound, match="no passage of the index is of document 'dx'; nothing was deleted"):
        delete_documents(index.root, index.rows(), ["d1", "dx"])
    assert read_deleted(index.root) is NONE


def test_a_purge_leaves_nothing_of_deleted_passages(root: Path) -> None:
    build(root)
    index = Index(root / "index")
    before = snapshot(root / "index" / "rows")
    whole = index.rows()
    delete_documents(index.root, whole, ["d3", "d11"])
    name = build(root, purge=True)
    facts = read_facts(root / "index" / "generations" / name)
    assert (facts["num_passages"], facts["num_codes"]) == (13, 11)
    assert sorted(facts["versions"]) == ["0", "2"]
    after = snapshot(root / "index" / "rows")
    assert {file: after[file] for file in before} == before
    rows = index.rows(name)
    assert not rows.read([3, 11]).any()
    kept = [row for row in range(13) if row not in (3, 11)]
    assert torch.equal(rows.read(kept), whole.read(kept))
    assert [passage.text for passage in rows.passages([3, 11])] == ["", ""]
    assert [passage.doc_id for passage in rows.passages([2, 12])] == ["d2", "d12"]
    generation = index.generation(name)
    assert generation.coarse.count() == 11
    assert not set(generation.background_ids.tolist()) & {3, 11}
    ids, _ = generation.coarse.search(np.zeros((1, 4), dtype=np.uint8), 13)
    assert sorted(ids[0].tolist()) == kept
    generation.close()
    assert not set(ids_of(traced(root))) & {3, 11}
    # It stays purged, and grows by what is deleted later.
    delete_documents(index.root, index.rows(name), ["d4"])
    second = build(root)
    assert read_facts(root / "index" / "generations" / second)["num_codes"] == 10
    assert not index.rows(second).read([3, 4, 11]).any()


def test_a_running_reader_sees_deletions_a_moment_later(root: Path) -> None:
    build(root)
    index, now = Index(root / "index"), [0.0]
    live = Tombstones(index.root, refresh_seconds=2.0, clock=lambda: now[0])
    assert live.now() is NONE
    delete_documents(index.root, index.rows(), ["d5"])
    now[0] = 1.9
    assert live.now() is NONE
    now[0] = 2.0
    assert live.now().passage_ids.tolist() == [5]
    (root / "index" / "deleted.parquet").write_bytes(b"x")
    now[0] = 4.0
    with pytest.raises(CorruptArtifact, match=r"deleted\.parquet' cannot be read"):
        live.now()


def test_deleting_does_not_wait_for_a_build(root: Path) -> None:
    build(root)
    index = Index(root / "index")
    with writing(index.root):
        assert delete_documents(index.root, index.rows(), ["d5"]).passage_ids.tolist() == [5]


# --- object stores -----------------------------------------------------------------------------------------------


def test_an_index_is_built_in_an_object_store_with_the_same_bytes(root: Path) -> None:
    name = build(root, append=more(root))
    place = location("memory://derived/index")
    config = make_config(settings(root, append=more(root)))
    generation = build_index(config, place)
    assert generation.name == name
    generation.close()
    for file, data in snapshot(root / "index").items():
        assert (place / file).read_bytes() == data, file
    tracer = Tracer(Index(place), Index(place).load_model())
    one, two = tracer.trace(QUERY, k=5), traced(root)
    assert ids_of(one) == ids_of(two)
    assert [item.score for item in one.proponents] == [item.score for item in two.proponents]
    tracer.close()


# --- the end of generations --------------------------------------------------------------------------------------


def test_what_a_generation_stands_on_is_never_garbage(root: Path) -> None:
    first = build(root)
    second = build(root, append=more(root), mix={"damping": 0.5})
    catalog = Index(root / "index").catalog
    assert garbage(catalog) == []
    with pytest.raises(InvalidRequest, match=f"'{second}' answers now; activate another one first"):
        retire(catalog, second)
    retire(catalog, first)
    retire(catalog, first)
    assert catalog.finished() == [second]
    assert catalog.describe(first).state == "retired"
    with pytest.raises(NotReady, match="was retired; bring it back first"):
        catalog.activate(first)
    bring_back(catalog, first)
    assert catalog.finished() == sorted([first, second])
    catalog.activate(first)
    retire(catalog, second)
    (found,) = garbage(catalog)
    assert (found.path.name, found.why) == (second, "a retired generation")
    assert found.num_bytes > 0
    before = traced(root)
    assert collect(catalog) == [found]
    assert not found.path.exists()
    assert ids_of(traced(root)) == ids_of(before)
    # The rows of the second part wait for another generation: nothing is encoded again.
    assert build(root, append=more(root), mix={"damping": 0.5}) == second


def test_purged_rows_go_when_no_generation_has_them_any_more(root: Path) -> None:
    first = build(root)
    index = Index(root / "index")
    delete_documents(index.root, index.rows(), ["d3"])
    second = build(root, purge=True)
    catalog = index.catalog
    assert garbage(catalog) == []
    retire(catalog, first)
    (root / "index" / "rows" / ".half.ab.tmp").write_bytes(b"x")
    why = {item.path.name: item.why for item in garbage(catalog)}
    assert why.pop(first) == "a retired generation"
    assert why.pop(".half.ab.tmp") == "left by a process that was killed"
    assert set(why) == {"000000.safetensors", "000000.parquet", "000000.json"}
    collect(catalog)
    assert garbage(catalog) == []
    assert not set(ids_of(traced(root))) & {3}
    assert Index(root / "index").rows(second).passages([4])[0].doc_id == "d4"
    # What comes later stands on the purged shard too.
    third = build(root, append=more(root))
    assert Index(root / "index").rows(third).num_passages == 19
    # Nothing of what was purged comes back with it, and documents can still be deleted.
    assert garbage(catalog) == []
    assert not (root / "index" / "rows" / "000000.safetensors").exists()
    delete_documents(index.root, Index(root / "index").rows(), ["d4", "d14"])
    assert ids_of(traced(root))
    # Damage to the only version that is left: encoded again, and purged again.
    (shard,) = (root / "index" / "rows").glob("000000-*.safetensors")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + b"x")
    fourth = build_index(
        make_config(settings(root, append=more(root), mix={"damping": 0.4})), root / "index", verify=True
    )
    fourth.close()
    assert not set(ids_of(traced(root))) & {3, 4, 14}


def test_nothing_is_collected_while_somebody_builds(root: Path) -> None:
    build(root)
    catalog = Index(root / "index").catalog
    with writing(root / "index"), pytest.raises(NotReady, match="another process builds"):
        collect(catalog)


def test_the_audit_keeps_a_generation_from_answering(root: Path) -> None:
    first = build(root)
    with pytest.raises(NotReady, match="failed its audit: coarse search and rerank find"):
        build(
            root,
            code={"kind": "bits", "size": 8, "store": "memory"},
            audit={"candidates": 2, "k": 2, "min_recall": 0.9},
        )
    catalog = Index(root / "index").catalog
    assert catalog.active() == first
    assert len(catalog.finished()) == 2


# --- building on what is there -----------------------------------------------------------------------------------


def test_an_index_knows_what_it_was_built_with(root: Path) -> None:
    first = build(root, append=more(root), mix={"damping": 0.3})
    again = make_config(settings_of(root / "index"))
    assert [corpus.paths for corpus in again.corpora] == [
        (str(root / "one.jsonl"),),
        (str(root / "two.jsonl"),),
    ]
    assert build_index(again, root / "index").name == first
    assert main(["index", "--out", str(root / "index"), "--damping", "0.5"]) == 0
    second = Index(root / "index").active()
    assert second != first
    assert read_facts(root / "index" / "generations" / second)["mix"]["damping"] == 0.5
    assert read_facts(root / "index" / "generations" / second)["parts"] == 2


def test_a_corpus_need_not_be_kept_for_ever(root: Path) -> None:
    build(root)
    (root / "one.jsonl").unlink()
    assert main(["index", "--out", str(root / "index"), "--append", str(root / "two.jsonl")]) == 0
    index = Index(root / "index")
    assert index.rows(index.active()).num_passages == 19
    assert main(["index", "--out", str(root / "index"), "--append", str(root / "two.jsonl")]) == 0
    assert len(index.catalog.finished()) == 2
    # One that was not read to its end is needed.
    (root / "index" / "rows" / "000003.json").unlink()
    (root / "two.jsonl").unlink()
    assert main(["index", "--out", str(root / "index")]) == 3


def test_documents_are_deleted_and_generations_retired_from_the_command_line(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(root / "index")
    first = build(root)
    second = build(root, mix={"damping": 0.5})
    assert main(["activate", out, first]) == 0
    assert Index(out).active() == first
    assert main(["retire", out, first]) == 2
    assert main(["retire", out, second]) == 0
    assert main(["retire", out, second, "--undo"]) == 0
    assert main(["retire", out, second]) == 0
    capsys.readouterr()
    assert main(["collect", out, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [item["why"] for item in listed["items"]] == ["a retired generation"]
    assert main(["collect", out, "--apply"]) == 0
    assert "would go" not in capsys.readouterr().err
    assert Index(out).catalog.names() == [first]
    (root / "ids").write_text("d1\nd2\n")
    assert main(["delete", out, "d5", "--file", str(root / "ids")]) == 0
    assert read_deleted(Index(out).root).doc_ids == ("d1", "d2", "d5")
    assert main(["delete", out, "nobody"]) == 3
    assert main(["delete", out]) == 2
    assert main(["index", "--out", out, "--purge"]) == 0
    assert read_facts(root / "index" / "generations" / Index(out).active())["num_codes"] == 10
