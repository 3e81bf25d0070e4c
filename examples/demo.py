"""The demo that `make demo` runs: index the example corpus, then ask what made the model say four things.

It runs the commands it prints, in one process, so that Python's imports are paid once; typed into a shell they give
the same. The corpus and the model are the project's own (`make_corpus.py`, `train_lm.py`); the optimizer's second
moments come with the checkpoint.

    python examples/demo.py [--keep]
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

from trackstar.cli import main as trackstar

OUT = Path("demo-out")
EXAMPLE = Path("examples/demo")
# Smaller blocks than would be proposed: the whitening of 4,096 dimensions takes longer than all the rest.
INDEX = ["--layer-blocks", "4", "--rows", "32", "--cols", "32", "--source-field", "source"]


def run(arguments: list[str]) -> None:
    """Print a command and run it; ends the demo if it fails."""
    print(f"\n$ trackstar {shlex.join(arguments)}\n", flush=True)
    code = trackstar(arguments)
    sys.stdout.flush()
    if code:
        sys.exit(code)


def main() -> None:
    """Index and trace."""
    parser = argparse.ArgumentParser(description="Index the example corpus and trace a few prompts.")
    parser.add_argument(
        "--keep", action="store_true", help=f"go on with the index in {OUT} instead of building it anew"
    )
    keep = parser.parse_args().keep
    os.chdir(Path(__file__).resolve().parents[1])
    began = time.monotonic()
    if not keep:
        shutil.rmtree(OUT, ignore_errors=True)
    model = str(EXAMPLE / "model")
    run(["index", str(EXAMPLE / "corpus.jsonl.gz"), "--model", model, "--moments", model, "--out", str(OUT), *INDEX])
    queries = [json.loads(line) for line in (EXAMPLE / "queries.jsonl").read_text(encoding="utf-8").splitlines()]
    for query in queries:
        prompt, target = query["inputs_plaintext"], query["targets_plaintext"]
        run(["trace", "--index", str(OUT), "--prompt", prompt, "--target", target, "--k", "5"])
    print(f"\nThe demo took {time.monotonic() - began:.0f} s. The index stays in {OUT}; ask it something else:")
    print(f"\n$ .venv/bin/trackstar trace --index {OUT} --prompt 'The capital of Italy is'")


if __name__ == "__main__":
    main()
