"""Settings that every test shares; they stand before any import of torch or a Hugging Face package."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from tests.milvus_process import MilvusProcess

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Threads that wait by spinning starve whatever else runs: 30 times slower where a test asks for two threads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

# No deadline: speed belongs in benchmarks. Derandomised: the same tests fail on every machine.
hypothesis.settings.register_profile("trackstar", deadline=None, derandomize=True)
hypothesis.settings.load_profile("trackstar")


@pytest.fixture(scope="session")
def milvus() -> Iterator[MilvusProcess]:
    """A real Milvus server, one for all tests; whoever stops it starts it again."""
    from tests.milvus_process import milvus_server

    with milvus_server() as server:
        yield server
