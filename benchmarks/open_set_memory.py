"""Does `trackstar eval open` hold its corpus in memory? Peak memory of the same evaluation on corpora of two sizes.

    python -m benchmarks.open_set_memory 50000 200000

Each corpus holds so many made-up passages of 8 to 60 words, none of them a statement of a fact; queries are 50 of the
demo's facts. Anonymous memory is what counts: pages of mapped files can be given back at any time. It is sampled every
20 ms from Linux's /proc. `in memory` is the same with the corpus as Python texts and the whole index of bm25s.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

FACTS = Path("examples/demo/facts.jsonl")
_HELD = """
import sys, json, bm25s
from trackstar.corpus import CorpusConfig
from trackstar.evaluation.sentences import Sentences
from trackstar.evaluation.lexical import words_in
held = Sentences.read(CorpusConfig(paths=(sys.argv[1],)))
ids = {}
tokens = [[ids.setdefault(word, len(ids)) for word in words_in(text)] for text in held.texts]
scorer = bm25s.BM25(method="lucene")
scorer.index((tokens, ids), show_progress=False)
"""


def make_corpus(path: Path, count: int) -> None:
    """Passages of words drawn by Zipf's law."""
    generator = np.random.default_rng(0)
    words = np.array([f"w{number:x}" for number in range(50_000)])
    with path.open("w") as stream:
        for number in range(count):
            drawn = words[np.minimum(generator.zipf(1.2, generator.integers(8, 61)) - 1, len(words) - 1)]
            stream.write(json.dumps({"id": f"passage-{number}", "text": " ".join(drawn.tolist())}) + "\n")


def peak_of(command: list[str]) -> tuple[float, float]:
    """Peak of anonymous memory in MiB, and seconds, of a command."""
    started, peak = time.monotonic(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                peak = max(peak, int(line.split()[1]))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{command} failed")
    return peak / 1024, time.monotonic() - started


def main() -> None:
    """Measure and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", type=int, nargs="+")
    parser.add_argument("--dense", action="store_true", help="with the sentence embeddings too")
    arguments = parser.parse_args()
    methods = ["{name: BM25, kind: lexical}", "{name: random, kind: random}"]
    methods += ["{name: MiniLM, kind: dense}"] if arguments.dense else []
    with tempfile.TemporaryDirectory() as folder:
        for size in arguments.sizes:
            corpus, config = Path(folder) / f"{size}.jsonl", Path(folder) / "open.yaml"
            make_corpus(corpus, size)
            config.write_text(
                f"facts: {FACTS}\ncorpus: {{paths: [{corpus}]}}\nentailment: {{by: rules}}\nqueries: 50\n"
                f"methods: [{', '.join(methods)}]\n"
            )
            out = str(Path(folder) / f"out-{size}")
            streamed = peak_of([sys.executable, "-m", "trackstar.cli", "eval", "open", str(config), "--out", out])
            held = peak_of([sys.executable, "-c", _HELD, str(corpus)])
            print(
                f"{size:>10,} passages, {corpus.stat().st_size / 2**20:.0f} MiB: eval open {streamed[0]:.0f} MiB in "
                f"{streamed[1]:.0f} s; in memory {held[0]:.0f} MiB in {held[1]:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
