"""Every way a command can end: one sentence and its exit code, a traceback only on request."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Annotated

import pytest
import typer

from trackstar.errors import CorruptArtifact, NotFound, StorageFull
from trackstar.exits import DEFECT, INTERRUPTED, Debug, run


def failing(error: BaseException, debug: Debug) -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)

    @app.callback()
    def root(wanted: Annotated[bool, typer.Option("--debug")] = False) -> None:
        debug.wanted = wanted

    @app.command()
    def fail(number: Annotated[int, typer.Option()] = 1) -> None:
        raise error

    return app


@pytest.fixture
def ended(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def call(error: BaseException, *arguments: str) -> tuple[int, str]:
        debug = Debug()
        code = run(failing(error, debug), debug, arguments)
        captured = capsys.readouterr()
        assert captured.out == ""
        return code, captured.err

    return call


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (NotFound("there is no 'x'"), 3, "error: there is no 'x'"),
        (CorruptArtifact("two\nlines"), 6, "error: two lines"),
        (StorageFull("no space"), 9, "error: no space"),
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), 9, "error: no space is left to write '/a/b'"),
        (OSError(errno.EFBIG, "File too large"), 9, "error: no space is left;"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), 1, "error: /a/b: Permission denied"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 1, "pip install 'trackstar[encoder]'"),
        (ModuleNotFoundError("no", name="milvus_lite.server"), 1, "pip install 'trackstar[index]'"),
        (
            ModuleNotFoundError("No module named 'oops'", name="oops"),
            DEFECT,
            "a defect of trackstar (ModuleNotFoundError",
        ),
        (ZeroDivisionError("division by zero"), DEFECT, "a defect of trackstar (ZeroDivisionError: division by zero)"),
        (OSError("without a number"), DEFECT, "a defect of trackstar (OSError"),
        (KeyboardInterrupt(), INTERRUPTED, "interrupted; give the same command again to continue"),
        (typer.Abort(), INTERRUPTED, "interrupted; give the same command again to continue"),
    ],
)
def test_an_error_is_one_line_and_its_code(
    ended: Callable[..., tuple[int, str]], error: BaseException, code: int, says: str
) -> None:
    found, text = ended(error, "fail")
    assert found == code
    assert says in text
    assert text.count("\n") == 1
    found, text = ended(error, "--debug", "fail")
    assert found == code
    assert says in text.splitlines()[-1]
    if code != INTERRUPTED:
        assert "Traceback" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["fail", "--nothing"], "--nothing"), (["other"], "other"), (["fail", "--number", "x"], "--number")],
)
def test_wrong_usage_is_one_line_and_two(
    ended: Callable[..., tuple[int, str]], arguments: list[str], says: str
) -> None:
    code, text = ended(ZeroDivisionError(), *arguments)
    assert code == 2
    assert text.startswith("error: ")
    assert says in text
    assert text.count("\n") == 1


def test_a_command_that_works_is_zero() -> None:
    app = typer.Typer(add_completion=False)

    @app.command()
    def work() -> None:
        pass

    assert run(app, Debug(), []) == 0
