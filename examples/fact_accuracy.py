"""Measures how many facts a model has learnt: greedy completion of a fact's prompt, compared with its object.

Contract: for each fact of a file in the layout of the TrackStar release, the model continues bos + prompt greedily by
as many tokens as " " + entity1 has; the fact counts as known when it produced exactly these tokens. Prints one JSON
object: the share of known facts for each prompt form, the mean loss of the objects (nats per token) and the share per
relation for the first form.
What it does not do: it accepts no alias and no other wording.

Example:
    python examples/fact_accuracy.py examples/demo/model examples/demo/facts.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = ("prompt0", "prompt1", "prompt2")


@torch.inference_mode()
def completion(model: Any, tokenizer: Any, prompt: str, target: str) -> tuple[bool, float]:
    """Whether greedy decoding gives the target, and the mean loss of its tokens in nats.

    Every token of the target is the most likely one given those before it exactly when greedy decoding produces it, so
    one forward pass answers both.
    """
    start = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    continuation = tokenizer(f" {target}", add_special_tokens=False)["input_ids"]
    logits = model(torch.tensor([start + continuation])).logits[0, len(start) - 1 : -1]
    wanted = torch.tensor(continuation)
    loss = torch.nn.functional.cross_entropy(logits.float(), wanted)
    return bool((logits.argmax(dim=-1) == wanted).all()), float(loss)


def measure(model_folder: Path, facts_file: Path) -> dict[str, Any]:
    """Shares are between 0 and 1; `known_by_relation` is for prompt0."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    facts = [json.loads(line) for line in facts_file.read_text(encoding="utf-8").splitlines()]
    known: dict[str, list[bool]] = defaultdict(list)
    losses: dict[str, list[float]] = defaultdict(list)
    relations: dict[str, list[bool]] = defaultdict(list)
    for fact in facts:
        for prompt in PROMPTS:
            right, loss = completion(model, tokenizer, fact[prompt], fact["entity1"])
            known[prompt].append(right)
            losses[prompt].append(loss)
            if prompt == "prompt0":
                relations[fact["relation"]].append(right)
    return {
        "facts": len(facts),
        "known": {prompt: sum(known[prompt]) / len(facts) for prompt in PROMPTS},
        "object_loss": {prompt: sum(losses[prompt]) / len(facts) for prompt in PROMPTS},
        "known_by_relation": {name: sum(values) / len(values) for name, values in sorted(relations.items())},
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("facts", type=Path, help="facts.jsonl")
    options = parser.parse_args(argv)
    print(json.dumps(measure(options.model, options.facts), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
