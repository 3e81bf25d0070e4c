"""An index folder: what may change between runs and what may not, and what opening it checks."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests import tiny
from trackstar.build import build_index, make_config
from trackstar.encode import Example
from trackstar.errors import CorruptArtifact, Incompatible, InvalidRequest, NotFound, NotReady
from trackstar.index import FORMAT, Correction, Index, check_identity, fix_identity, load_correction, save_correction
from trackstar.moments import SeparableScale
from trackstar.storage import is_temporary, temporary_of

TEXTS = [
    "The river runs to the sea.",
    "A bridge",
    "Snow fell on the hills all night.",
    "x",
    "Birds sang, and then slept.",
]


def settings(root: Path, **changes: Any) -> dict[str, Any]:
    return {
        "corpus": {"paths": [str(root / "corpus.jsonl")]},
        "model": str(root / "model"),
        "projection": {"layer_blocks": 2, "rows": 4, "cols": 4},
        "code": {"kind": "bits", "size": 32, "store": "memory"},
        "background": 4,
        "shard_passages": 2,
        "row_dtype": "float32",
        **changes,
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a corpus and a finished index of it."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("built")
    tiny.save_model(root / "model", "gpt2")
    (root / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    build_index(make_config(settings(root)), root / "index").close()
    return root


@pytest.fixture
def root(built: Path, tmp_path: Path) -> Path:
    """A copy that a test may change; the index still names the model where it was built."""
    return Path(shutil.copytree(built, tmp_path / "copy"))


# --- identity ----------------------------------------------------------------------------------------------------

IDENTITY: dict[str, Any] = {
    "format": FORMAT,
    "model": {"path": "/models/a", "digest": "abc"},
    "corpus": {"paths": ["/data/a"], "text_field": "text", "fingerprint": "f0"},
    "moments": {"source": "none", "rank": 4},
    "blocks": [
        {"name": "layers 0-1 attention", "rows": 4, "cols": 4},
        {"name": "layers 0-1 mlp", "rows": 4, "cols": 4},
    ],
    "window_tokens": 64,
    "max_batch_tokens": 8192,
    "exclude": ["*.gate"],
}


def changed(place: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    identity = deepcopy(IDENTITY)
    inner: Any = identity
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return identity


def test_the_first_run_fixes_the_identity(tmp_path: Path) -> None:
    for root in (tmp_path / "new", tmp_path):
        check_identity(root, IDENTITY)
    fix_identity(tmp_path / "new", IDENTITY)
    content = (tmp_path / "new" / "index.json").read_bytes()
    assert json.loads(content) == IDENTITY
    fix_identity(tmp_path / "new", changed(("window_tokens",), 32))
    assert (tmp_path / "new" / "index.json").read_bytes() == content
    check_identity(tmp_path / "new", IDENTITY)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("model", "digest"), "xyz", "model.digest = 'abc', this command has 'xyz'"),
        (("corpus", "fingerprint"), "f1", "corpus.fingerprint = 'f0', this command has 'f1'"),
        (("corpus", "text_field"), "body", "corpus.text_field = 'text', this command has 'body'"),
        (("moments", "source"), "estimate", "moments.source = 'none', this command has 'estimate'"),
        (("moments", "rank"), None, "moments.rank = 4, this command has None"),
        (("blocks", 1, "cols"), 8, "blocks.1.cols = 4, this command has 8"),
        (("window_tokens",), 32, "window_tokens = 64, this command has 32"),
        (("exclude",), [], "exclude.0 = '*.gate', this command has None"),
        (("new",), 1, "new = None, this command has 1"),
    ],
)
def test_a_difference_names_the_key_and_both_values(
    place: tuple[str | int, ...], value: Any, message: str, tmp_path: Path
) -> None:
    fix_identity(tmp_path, IDENTITY)
    with pytest.raises(Incompatible) as caught:
        check_identity(tmp_path, changed(place, value))
    assert (
        str(caught.value) == f"{str(tmp_path)!r} was started with {message}; use the same or build into another folder"
    )


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("model", "path"), "/elsewhere"),
        (("corpus", "paths"), ["/elsewhere"]),
        (("corpus", "paths"), ["/a", "/b"]),
        (("max_batch_tokens",), 16),
    ],
)
def test_places_and_batches_may_change(place: tuple[str, ...], value: Any, tmp_path: Path) -> None:
    fix_identity(tmp_path, IDENTITY)
    check_identity(tmp_path, changed(place, value))


def test_another_folder_or_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequest, match="is not a folder; give another --out"):
        check_identity(tmp_path / "file", IDENTITY)
    with pytest.raises(InvalidRequest, match="is not empty and holds no index; give another --out"):
        check_identity(tmp_path, IDENTITY)


def test_a_first_run_that_was_killed_can_start_again(tmp_path: Path) -> None:
    temporary_of(tmp_path / "index.json").write_bytes(b'{"half')
    check_identity(tmp_path, IDENTITY)
    fix_identity(tmp_path, IDENTITY)
    assert [path.name for path in tmp_path.iterdir() if not is_temporary(path)] == ["index.json"]


def test_a_truncated_identity_is_corrupt(tmp_path: Path) -> None:
    fix_identity(tmp_path, IDENTITY)
    path = tmp_path / "index.json"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(CorruptArtifact, match=r"index\.json"):
        check_identity(tmp_path, IDENTITY)


# --- the correction ----------------------------------------------------------------------------------------------


@hypothesis_settings(max_examples=30)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(1, 5), st.floats(0, 1)), max_size=4),
    st.integers(0, 1000),
)
def test_a_correction_comes_back(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, int, int, float]], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    correction: Correction = {}
    for number, (terms, m, n, error) in enumerate(shapes):
        name = f"model.layers.{number}.mlp.experts.down_proj[{number}]"
        correction[name] = (
            SeparableScale(
                out=torch.rand(m, terms, generator=generator).mT,  # not contiguous
                in_=torch.rand(terms, n, generator=generator),
                error=error,
            )
            if terms
            else torch.rand(n, m, generator=generator).mT
        )
    path = tmp_path_factory.mktemp("correction") / "correction.safetensors"
    save_correction(path, correction)
    found = load_correction(path)
    assert found.keys() == correction.keys()
    for name, scale in correction.items():
        other = found[name]
        if isinstance(scale, SeparableScale):
            assert isinstance(other, SeparableScale)
            assert torch.equal(other.out, scale.out)
            assert torch.equal(other.in_, scale.in_)
            assert other.error == scale.error
        else:
            assert torch.equal(torch.as_tensor(other), scale)
    before = path.read_bytes()
    save_correction(path, found)
    assert path.read_bytes() == before


def test_an_unreadable_correction_is_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "correction.safetensors"
    with pytest.raises(CorruptArtifact, match="unreadable"):
        load_correction(path)
    scale = SeparableScale(out=torch.ones(2, 3), in_=torch.ones(2, 4), error=0.5)
    save_correction(path, {"w": scale})
    whole = path.read_bytes()
    for damaged in (b"", whole[:-3], whole[:20], b"{}" + whole):
        path.write_bytes(damaged)
        with pytest.raises(CorruptArtifact, match="unreadable; delete the index folder and build it again"):
            load_correction(path)
    for metadata in (None, {}, {"errors": "{"}, {"errors": '{"other": 1}'}, {"errors": "3"}):
        safetensors.torch.save_file({"w:out": scale.out, "w:in": scale.in_}, path, metadata)
        with pytest.raises(CorruptArtifact, match="unreadable"):
            load_correction(path)


# --- opening -----------------------------------------------------------------------------------------------------


def test_a_finished_index_opens(built: Path) -> None:
    index = Index(built / "index")
    assert index.layout.dim == 4 * 16
    assert [block.name for block in index.layout.blocks][:2] == ["layers 0-1 attention", "layers 0-1 mlp"]
    assert index.generation_names() == [index.active()]
    generation = index.generation()
    assert generation.name == index.active()
    assert index.rows().num_passages == len(TEXTS)
    generation.close()


def test_its_encoder_makes_the_rows_it_holds(built: Path) -> None:
    """Model, projection and correction come back as they were: encoding a passage again gives its row."""
    index = Index(built / "index")
    rows = index.rows()
    ids = list(range(rows.num_passages))
    encoder = index.encoder(index.load_model())
    found = encoder.encode([Example(tokens=passage.tokens) for passage in rows.passages(ids)])
    torch.testing.assert_close(found.rows_ND, rows.read(ids), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found.loss_N.numpy(), rows.column("loss"), rtol=1e-6)
    assert bool(found.rows_ND.any(dim=1).all())
    encoder.close()


def test_a_folder_without_an_index_is_not_found(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "none"):
        with pytest.raises(NotFound, match=rf"holds no index; build one with `trackstar index .* --out {root}`"):
            Index(root)


@pytest.mark.parametrize("content", [{"format": FORMAT + 1}, {"format": None}, {}, [], None, "x"])
def test_another_format_is_incompatible(content: Any, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(json.dumps(content))
    with pytest.raises(Incompatible, match=rf"has format .*, this version reads format {FORMAT}; build it again"):
        Index(tmp_path)


def test_an_unfinished_index_is_not_ready(root: Path) -> None:
    (root / "index" / "active.json").unlink()
    index = Index(root / "index")
    with pytest.raises(NotReady, match="no active generation yet; give the index command again"):
        index.generation()
    (root / "index" / "rows" / "part-000.json").unlink()
    with pytest.raises(NotReady, match=r"rows .* are not complete"):
        index.rows()


def test_an_unknown_generation_names_those_there_are(root: Path) -> None:
    index = Index(root / "index")
    (known,) = index.generation_names()
    with pytest.raises(NotFound, match=f"has no generation 'other'; it has {known}"):
        index.generation("other")
    shutil.rmtree(root / "index" / "generations")
    with pytest.raises(NotFound, match=f"has no generation '{known}'; it has none"):
        index.generation()


def test_a_moved_model_is_found_where_it_is_now(root: Path) -> None:
    moved = Path(shutil.move(root / "model", root / "moved"))
    path = root / "index" / "index.json"
    facts = json.loads(path.read_text())
    facts["model"]["path"] = str(root / "model")  # where this copy's model was
    path.write_text(json.dumps(facts))
    index = Index(root / "index")
    with pytest.raises(NotFound, match="no checkpoint folder"):
        index.load_model()
    assert index.load_model(moved).digest == facts["model"]["digest"]


def test_another_checkpoint_is_refused_and_both_are_named(root: Path) -> None:
    other = tiny.save_model(root / "other", "gpt2", seed=1)
    index = Index(root / "index")
    built_with = index.facts["model"]["digest"][:12]
    with pytest.raises(
        Incompatible, match=rf"other' has digest [0-9a-f]{{12}}, the index was .* checkpoint {built_with}"
    ):
        index.load_model(other)


def test_building_again_keeps_every_byte(root: Path) -> None:
    """The same corpus and model in another place: the finished index is taken as it is."""
    folder = root / "index"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    build_index(make_config(settings(root, max_batch_tokens=64)), folder).close()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"projection": {"layer_blocks": 2, "rows": 4, "cols": 5}}, "blocks.0.cols = 4, this command has 5"),
        (
            {"projection": {"layer_blocks": 2, "rows": 4, "cols": 4, "seed": 1}},
            "projection.seed = 0, this command has 1",
        ),
        ({"row_dtype": "bfloat16"}, "row_dtype = 'float32', this command has 'bfloat16'"),
        ({"shard_passages": 3}, "shard_passages = 2, this command has 3"),
        ({"window_tokens": 7}, "window_tokens = 64, this command has 7"),
        ({"moments": {"source": "estimate"}}, "moments.source = 'none', this command has 'estimate'"),
        ({"exclude": ["*.0.attn.*"]}, "exclude.0 = None, this command has '*.0.attn.*'"),
    ],
)
def test_building_something_else_there_is_refused(changes: dict[str, Any], key: str, root: Path) -> None:
    with pytest.raises(Incompatible) as caught:
        build_index(make_config(settings(root, **changes)), root / "index")
    assert key in str(caught.value)


def test_another_corpus_there_is_refused(root: Path) -> None:
    with (root / "corpus.jsonl").open("a") as stream:
        stream.write(json.dumps({"text": "one more"}) + "\n")
    with pytest.raises(Incompatible, match=r"corpus\.fingerprint = "):
        build_index(make_config(settings(root)), root / "index")


def test_altered_shards_are_built_again_when_asked(root: Path) -> None:
    """`verify` finds a flipped bit and rebuilds that shard to the same bytes."""
    folder = root / "index"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in ("000000.safetensors", "000001.parquet"):
        path = folder / "rows" / name
        data = bytearray(path.read_bytes())
        data[-9] ^= 4
        path.write_bytes(data)
    (folder / "rows" / "000002.safetensors").unlink()
    build_index(make_config(settings(root)), folder, verify=True).close()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_whole_kind_of_weights_can_be_left_out(root: Path) -> None:
    """Without any attention weight those blocks stay empty, and the others make the index."""
    build_index(make_config(settings(root, exclude=["*.attn.*"])), root / "mlp").close()
    index = Index(root / "mlp")
    rows = index.rows().read(range(len(TEXTS)))
    generation = index.generation()
    for number, block in enumerate(index.layout.blocks):
        part = rows[:, index.layout.span(number)]
        assert bool(part.any()) == block.name.endswith("mlp")
    assert np.isfinite(generation.norms_N).all()
    assert (generation.norms_N > 0).all()
    generation.close()
