"""Files that appear whole or not at all, and the digests that tell what is in them.

Contract: `publish` writes under a temporary name in the same folder, flushes to disk and renames, or puts one whole
object into an object store; a crash leaves either the old file or none. Several processes may publish the same file at
once: one of them wins. Nothing that is published as part of an index holds a time or a host, so the same inputs give
the same bytes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trackstar.blobs import Location, RemotePath
from trackstar.errors import CorruptArtifact, NotFound, StorageFull

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TEMPORARY = ".tmp"


def publish(path: Location, data: bytes) -> str:
    """Write `data` atomically and return its SHA-256 in hexadecimal.

    Raises:
        StorageFull: no space; whatever was published before is untouched.
        NotReady: an object store refuses it, or does not answer.
    """
    if isinstance(path, RemotePath):
        path.write_bytes(data)
        return hashlib.sha256(data).hexdigest()
    temporary = temporary_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if error.errno in _FULL:
            raise StorageFull(
                f"no space is left to write {str(path)!r} ({len(data):,} bytes); free some and give the same command "
                "again, what is finished is kept"
            ) from error
        raise
    return hashlib.sha256(data).hexdigest()


def temporary_of(path: Path) -> Path:
    """A name, new each time, under which `path` is written before it is published; a killed process may leave it."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{_TEMPORARY}")


def is_temporary(path: Path) -> bool:
    """Whether a file is what a killed `publish` left, or one that runs now."""
    return path.name.startswith(".") and path.name.endswith(_TEMPORARY)


def leftovers(folder: Path) -> Iterator[Path]:
    """What killed processes left below a folder. Only for one who knows that nobody writes there."""
    return (path for path in folder.rglob(f".*{_TEMPORARY}") if path.is_file())


def publish_json(path: Location, content: Any) -> str:
    """Write `content` as indented JSON with sorted keys, atomically."""
    return publish(path, (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())


def read_json(path: Location) -> Any:
    """Read a JSON file.

    Raises:
        NotFound: no such file.
        CorruptArtifact: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"there is no {str(path)!r}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorruptArtifact(f"{str(path)!r} is not valid JSON: it is truncated or was altered") from error


def file_digest(path: Location) -> str:
    """SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        NotFound: no such file.
    """
    if isinstance(path, RemotePath):
        found = hashlib.sha256()
        for chunk in path.store.chunks(path.key):
            found.update(chunk)
        return found.hexdigest()
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise NotFound(f"there is no {str(path)!r}") from error


def digest_of(content: Any) -> str:
    """SHA-256 of the canonical JSON form of `content`."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
