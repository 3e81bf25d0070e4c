"""How a command line ends: every error a user can cause becomes one sentence and an exit code, without a traceback.

    0 done   1 other   2 wrong request or usage   3 not found   4 not ready   5 overloaded   6 corrupt   7 incompatible
    8 unsupported model   9 disk full   10 too little time   11 unauthenticated   12 not permitted
    70 a defect of this program   130 interrupted

Contract: `run` never raises what a command raised, except `SystemExit`. With `debug.wanted` the traceback comes first.
"""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Sequence

import typer
from typer.exceptions import TyperException

from trackstar.errors import StorageFull, TrackstarError

DEFECT, INTERRUPTED = 70, 130
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_INTERRUPTED = "interrupted; give the same command again to continue"
# Packages that a role may be installed without, and the extra that brings each.
_EXTRAS = {
    "torch": "encoder",
    "transformers": "encoder",
    "pymilvus": "index",
    "milvus_lite": "index",
    "google": "client",
    "grpc": "client",
    "bm25s": "eval",
    "matplotlib": "eval",
    "sentence_transformers": "eval",
}


class Debug:
    """Whether tracebacks are wanted; set by the option, read when a command has failed."""

    def __init__(self) -> None:
        self.wanted = False


def run(app: typer.Typer, debug: Debug, arguments: Sequence[str] | None) -> int:
    """Run one command line (that of the process for None) and return its exit code."""
    debug.wanted = False
    try:
        code = app(args=None if arguments is None else list(arguments), prog_name="trackstar", standalone_mode=False)
        sys.stdout.flush()
        # Typer turns an interrupt into this code and says nothing.
        return _end(debug, _INTERRUPTED, INTERRUPTED) if code == INTERRUPTED else int(code or 0)
    except (KeyboardInterrupt, typer.Abort):
        return _end(debug, _INTERRUPTED, INTERRUPTED)
    except TrackstarError as error:
        return _end(debug, f"error: {error}", error.exit_code)
    except TyperException as error:
        return _end(debug, f"error: {error.format_message()}", error.exit_code)
    except OSError as error:
        return _end(debug, *_of_system(error))
    except Exception as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0]) if isinstance(error, ModuleNotFoundError) else None
        if extra is not None:
            return _end(debug, f"error: this command needs more packages: pip install 'trackstar[{extra}]'", 1)
        return _end(debug, _defect(error), DEFECT)


def _of_system(error: OSError) -> tuple[str, int]:
    if error.errno is None:
        return _defect(error), DEFECT
    if error.errno in _FULL:
        where = f" to write {error.filename!r}" if error.filename else ""
        return f"error: no space is left{where}; free some and give the same command again", StorageFull.exit_code
    return f"error: {error.filename or 'the system'}: {error.strerror}", TrackstarError.exit_code


def _defect(error: Exception) -> str:
    return f"error: a defect of trackstar ({type(error).__name__}: {error}); please report what --debug shows"


def _end(debug: Debug, sentence: str, code: int) -> int:
    if debug.wanted and sys.exc_info()[0] is not None:
        traceback.print_exc()
    print(" ".join(sentence.splitlines()), file=sys.stderr)
    return code
