"""One writer for one index: a lock that ends with the process that holds it.

    with writing(root): ...

The lock is the kernel's, on a file in the index folder, so a process that dies lets go of it; it holds for every
process that sees the folder on this machine, or over a file system that passes locks on. In an object store there are
no locks; there it is for whoever starts jobs to start one at a time (Ray jobs of one cluster exclude each other by a
name).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from trackstar.blobs import Location
from trackstar.errors import NotReady

LOCK_NAME = ".lock"


@contextmanager
def writing(root: Location, *, name: str = LOCK_NAME) -> Iterator[None]:
    """Hold an index for writing; the folder is made if it is missing, and taken away again if it stays empty.

    Raises:
        NotReady: another process writes to it.
    """
    if not isinstance(root, Path):
        yield
        return
    is_new = not root.exists()
    root.mkdir(parents=True, exist_ok=True)
    stream = _locked(root / name)
    try:
        yield
    finally:
        (root / name).unlink(missing_ok=True)
        stream.close()
        if is_new:
            with contextlib.suppress(OSError):
                root.rmdir()


def _locked(path: Path) -> IO[str]:
    while True:
        stream = path.open("a")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            stream.close()
            raise NotReady(
                f"another process builds in {str(path.parent)!r} now; wait until it ends, or stop it, and give the "
                "same command again"
            ) from error
        # The one who held it may have taken the file away between our opening and locking it.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(stream.fileno())):
                return stream
        stream.close()
