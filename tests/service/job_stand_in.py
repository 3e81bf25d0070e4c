"""Stands in for the command that a job runs: `python -m tests.service.job_stand_in CONFIG JOB_ID`.

It goes through the states of the pipeline and tells each, as the real one does. CONFIG says what happens: `steps` of
shards, `pause_seconds` after each, `fail_at` a state with the sentence `fail_with`, `stubborn` about SIGTERM. A file
`go` beside CONFIG is waited for if `wait` is true. Every start adds a line to `starts` beside CONFIG.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import yaml

from trackstar.jobs import PIPELINE_STATES, JobProgress, JobStore

COMMAND = (sys.executable, "-m", "tests.service.job_stand_in", "{config}", "{job_id}")


def main(config: Path, job_id: str) -> int:
    """Run it; returns the exit code."""
    asked = yaml.safe_load(config.read_text())
    store = JobStore(config.parents[2])
    with (config.parent / "starts").open("a") as starts:
        starts.write("started\n")
    if asked.get("stubborn"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    began = time.time()
    steps = asked.get("steps", 3)

    def tell(state: str, done: int, error: str = "") -> None:
        place = PIPELINE_STATES.index(state)
        counts = (steps, *(steps if place > at else done if place == at else 0 for at in (1, 3, 4)))
        store.write_progress(
            JobProgress(
                job_id=job_id,
                state=PIPELINE_STATES[place],
                shards=dict(zip(("planned", "encoded", "coded", "imported"), counts, strict=True)),
                passages_done=10 * counts[1],
                passages_total=10 * steps,
                tokens_done=100 * counts[1],
                tokens_total=100 * steps,
                tokens_per_second=250.0,
                remaining_seconds=float(len(PIPELINE_STATES) - 1 - place),
                generation="beta" if place >= 3 else "",
                collection="trackstar_beta" if place >= 4 else "",
                recall=0.97 if place >= 6 else None,
                note=f"shard {done}",
                error=error,
                started_seconds=began,
                updated_seconds=time.time(),
            )
        )
        time.sleep(asked.get("pause_seconds", 0.0))

    for state in PIPELINE_STATES if asked.get("build", {}).get("activate") else PIPELINE_STATES[:-1]:
        if state == asked.get("fail_at"):
            tell(state, 0, asked.get("told", ""))
            print("a line of the log")
            print(f"error: {asked['fail_with']}")
            return 9
        for done in range(1, steps + 1) if state in ("ENCODING", "CODING", "IMPORTING") else (0,):
            tell(state, done)
        while state == "PLANNED" and asked.get("wait") and not (config.parent / "go").exists():
            time.sleep(0.02)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
