"""One writer: a second one is refused, and a lock never outlives its process."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from trackstar.blobs import location
from trackstar.errors import InvalidRequest, NotReady
from trackstar.locks import writing


def _hold(root: Path, told: Connection) -> None:
    with writing(root):
        told.send("held")
        told.recv()


def test_a_second_writer_is_refused_until_the_first_has_died(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    holder = context.Process(target=_hold, args=(tmp_path, theirs))
    holder.start()
    assert ours.recv() == "held"
    with pytest.raises(NotReady, match="another process builds in"), writing(tmp_path):
        pass
    with writing(tmp_path, name=".other"):
        pass
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with writing(tmp_path):
        assert (tmp_path / ".lock").is_file()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_stays_empty_is_taken_away(tmp_path: Path) -> None:
    def fail() -> None:
        with writing(tmp_path / "new" / "index"):
            raise InvalidRequest("no")

    with pytest.raises(InvalidRequest):
        fail()
    assert not (tmp_path / "new" / "index").exists()
    with writing(tmp_path / "kept"):
        (tmp_path / "kept" / "file").write_text("x")
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["file"]


def test_object_stores_have_no_locks() -> None:
    place = location("memory://locks/index")
    with writing(place), writing(place):
        pass
