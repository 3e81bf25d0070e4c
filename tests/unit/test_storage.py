"""Files appear whole or not at all: on success, on failure and on a full disk."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trackstar.errors import CorruptArtifact, NotFound
from trackstar.storage import (
    digest_of,
    file_digest,
    is_temporary,
    leftovers,
    publish,
    publish_json,
    read_json,
    temporary_of,
)

LIMIT = 64 << 10
# Publishes one file that fits and one that does not, then the first again; says what happened.
FILL = """
import sys
from pathlib import Path
from trackstar.errors import StorageFull
from trackstar.storage import publish
folder, size = Path(sys.argv[1]), int(sys.argv[2])
publish(folder / "kept", b"old")
for name in ("kept", "new"):
    try:
        publish(folder / name, bytes(size))
    except StorageFull as error:
        print(error)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("data", [b"", b"abc", bytes(range(256)) * 1000])
def test_publish_writes_and_returns_the_digest(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    digest = publish(path, data)
    assert path.read_bytes() == data
    assert digest == hashlib.sha256(data).hexdigest() == file_digest(path)
    assert names(path.parent) == ["file"]


def test_publish_replaces_the_whole_file(tmp_path: Path) -> None:
    publish(tmp_path / "file", b"a long first version")
    publish(tmp_path / "file", b"short")
    assert (tmp_path / "file").read_bytes() == b"short"


def test_what_a_killed_process_left_harms_nobody_and_is_found(tmp_path: Path) -> None:
    left = temporary_of(tmp_path / "folder" / "file")
    publish(tmp_path / "folder" / "file", b"whole")
    left.write_bytes(b"half of it, and more than will be written")
    publish(tmp_path / "folder" / "file", b"new")
    assert (tmp_path / "folder" / "file").read_bytes() == b"new"
    assert list(leftovers(tmp_path)) == [left]
    assert is_temporary(left)
    assert not is_temporary(tmp_path / "folder" / "file")


def test_processes_that_publish_the_same_file_do_not_meet(tmp_path: Path) -> None:
    assert temporary_of(tmp_path / "file") != temporary_of(tmp_path / "file")


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    """A folder stands where the file should go, so the last step, renaming, fails."""
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "old").write_bytes(b"old")
    with pytest.raises(IsADirectoryError):
        publish(tmp_path / "file", b"new")
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file" / "old").read_bytes() == b"old"


def check_full(folder: Path, output: str, size: int) -> None:
    for line, name in zip(output.strip().splitlines(), ("kept", "new"), strict=True):
        assert re.fullmatch(rf"no space is left to write '.*/{name}' \({size:,} bytes\); free some .* is kept", line)
    assert names(folder) == ["kept"]
    assert (folder / "kept").read_bytes() == b"old"


def test_a_file_size_limit_is_storage_full(tmp_path: Path) -> None:
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({LIMIT}, {LIMIT}))\n{FILL}"
    found = subprocess.run(
        [sys.executable, "-c", limited, str(tmp_path), str(2 * LIMIT)], capture_output=True, text=True, check=True
    )
    check_full(tmp_path, found.stdout, 2 * LIMIT)


def can_mount() -> bool:
    try:
        command = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        return os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not can_mount(), reason="needs the right to mount a file system")
def test_a_full_disk_is_storage_full(tmp_path: Path) -> None:
    """A real file system of 64 KiB, mounted where only this test's child sees it."""
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    script = 'mount -t tmpfs -o size="$1" tmpfs "$2" && "$3" -c "$4" "$2" "$5" && cp -a "$2" "$6"'
    arguments = [str(LIMIT), str(disk), sys.executable, FILL, str(2 * LIMIT), str(copy)]
    found = subprocess.run(
        ["unshare", "-m", "sh", "-ec", script, "sh", *arguments], capture_output=True, text=True, check=True
    )
    check_full(copy, found.stdout, 2 * LIMIT)


def test_other_failures_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"not a folder")
    with pytest.raises((NotADirectoryError, FileExistsError)):
        publish(tmp_path / "file" / "below", b"x")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40)
@given(JSON)
def test_json_comes_back_and_has_one_form(content: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.json"
        digest = publish_json(path, content)
        assert read_json(path) == content
        assert digest == publish_json(path, json.loads(json.dumps(content)))


def test_json_bytes_do_not_depend_on_the_order_of_keys(tmp_path: Path) -> None:
    first = publish_json(tmp_path / "a", {"b": 1, "a": {"y": [1, 2], "x": "é"}})
    second = publish_json(tmp_path / "b", {"a": {"x": "é", "y": [1, 2]}, "b": 1})
    assert first == second
    assert "é" in (tmp_path / "a").read_text(encoding="utf-8")
    assert (tmp_path / "a").read_bytes().endswith(b"}\n")


@pytest.mark.parametrize("data", [b"", b'{"a": 1', b'{"a": "\xff"}', b"\x00" * 10])
def test_damaged_json_is_corrupt(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(CorruptArtifact, match=r"x\.json' is not valid JSON"):
        read_json(tmp_path / "x.json")


def test_missing_files_are_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"x\.json"):
        read_json(tmp_path / "x.json")
    with pytest.raises(NotFound, match=r"x\.bin"):
        file_digest(tmp_path / "x.bin")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(NotFound, match=r"there is no .*file/x\.json"):
        read_json(tmp_path / "file" / "x.json")


def test_file_digest_sees_every_bit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    data = bytearray(bytes(range(256)) * 20)
    digest = publish(path, bytes(data))
    data[2000] ^= 1
    path.write_bytes(data)
    assert file_digest(path) == hashlib.sha256(data).hexdigest() != digest


@settings(max_examples=40)
@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_digest_of_depends_on_content_only(content: dict[str, Any]) -> None:
    backwards = dict(reversed(content.items()))
    assert digest_of(content) == digest_of(backwards)
    assert digest_of(content) != digest_of({**content, "one more": 0})


def test_digest_of_is_the_hash_of_the_canonical_form() -> None:
    assert digest_of({"b": [1, None], "a": "é"}) == hashlib.sha256(b'{"a":"\\u00e9","b":[1,null]}').hexdigest()
