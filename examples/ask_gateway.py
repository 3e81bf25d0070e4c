"""Asks a running gateway: a trace in parts, the next page of its ranking, and what a training step would do.

    trackstar serve --index DIR &
    python examples/ask_gateway.py localhost:50051 "The capital of France is" Paris

Needs `pip install 'trackstar[client]'` only.
"""

from __future__ import annotations

import sys

from trackstar.client import Client
from trackstar.client_types import DonePart, EncodedPart, RankedPart
from trackstar.errors import TrackstarError


def main(address: str, prompt: str, target: str) -> None:
    """Print what each call answers."""
    with Client(address, timeout_seconds=120) as client:
        for part in client.trace_stream(prompt, target, k=10):
            if isinstance(part, EncodedPart):
                print(f"generation {part.generation}; probability of {target!r}: {part.explained.probability:.3g}")
            elif isinstance(part, RankedPart):
                state = "final" if part.final else "so far"
                print(f"{state}: {part.candidates_examined:,} passages scored, best {part.proponents[0].score:+.4f}")
            elif isinstance(part, DonePart):
                for item in part.answer.trace.proponents[:3]:
                    print(f"  {item.rank}. {item.score:+.4f} (z {item.z_score:+.1f}) {item.passage.text[:60]!r}")

        first = client.trace(prompt, target, k=10, page_size=5, evidence=())
        second = client.trace(prompt, target, k=10, page_size=5, evidence=(), page_token=first.next_page_token)
        print(f"the second page starts at rank {second.trace.proponents[0].rank}")

        best = [item.passage.passage_id for item in first.trace.proponents[:2]]
        for effect in client.verify(prompt, target, best).effects:
            change = effect.probability_after - effect.probability_before
            print(f"one step on passage {effect.passage_id} changes the probability by {change:+.3g}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(f"usage: {sys.argv[0]} HOST:PORT PROMPT TARGET")
    try:
        main(*sys.argv[1:])
    except TrackstarError as error:
        sys.exit(f"error: {error}")
