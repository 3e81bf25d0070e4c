"""Ray for as long as a command needs it: the cluster around it, or one on this machine that ends with it."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from services.reindex.config import Pool, Workers
from services.reindex.ray_engine import RayEngine
from trackstar.engine import Engine
from trackstar.errors import NotReady

# The object store holds numbers of items and answers, nothing large.
_OBJECT_STORE_BYTES = 256 << 20


@contextmanager
def cluster(address: str | None = None) -> Iterator[None]:
    """Ray for as long as the block runs: the cluster at the address, the one this runs in, or one of its own.

    Raises:
        NotReady: there is none at the address.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    # What Ray says of its own work is no news to whoever looks at the job's progress; warnings of it are in its logs.
    logging.getLogger("ray").setLevel(logging.ERROR)
    options: Any = {"log_to_driver": False, "configure_logging": False}
    if address is not None:
        try:
            ray.init(address=address, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise NotReady(f"there is no Ray cluster at {address!r}: {str(error).splitlines()[0]}") from error
        try:
            yield
        finally:
            ray.shutdown()
        return
    # Sockets lie in it, and their paths must be short.
    folder = tempfile.mkdtemp(prefix="ts", dir="/tmp" if Path("/tmp").is_dir() else None)
    try:
        ray.init(
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            _temp_dir=folder,
            **options,
        )
        try:
            yield
        finally:
            ray.shutdown()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def engine(workers: int) -> Iterator[Engine]:
    """An engine of so many actors that hold a model, on a cluster as of `cluster`."""
    with cluster():
        yield RayEngine(Workers(encoders=Pool(max=workers)))
