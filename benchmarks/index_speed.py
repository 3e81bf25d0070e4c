"""How fast is indexing beside the least that any gradient method must do?

    python -m benchmarks.index_speed [--corpus FILE.jsonl ... --text-field text] [--rows 16 --cols 16] [--json FILE]

One model made from a configuration (GPT-NeoX), one run, every contestant on the same tokens:

    training step   forward, full backward, AdamW step
    floor           forward, backward to activations only: frozen weights, loss over all tokens, no capture
    rows, …         trackstar's encode with each optimizer correction; moments are synthetic, which costs the same
    index, …        `build_index` from a JSONL to finished statistics: read, tokenise, encode, write shards, R_train

at two length settings: every passage as long as the window, and the lengths of a corpus (synthetic unless --corpus is
given). For mixed lengths the floor runs twice, on random batches padded to their longest passage ("floor, padded") and
on batches sorted by length as ours are ("floor").

Method: contestants take turns, in another order every round, and only times of the same round are divided; the median
over the rounds is reported with the quartiles. With one thread the clock is the process' CPU time, so that neighbours
on a shared machine do not count (--clock wall for the other). Memory is measured in a fresh process per contestant: the
peak of resident memory above what stands after the model is loaded and warm, over one pass.

Mixed lengths need enough passages per turn (--mixed-passages): ours are batched with passages of their own length, and
a shard holds thousands. Too few make small batches, which cost everyone, ours most.

Ratios only: the absolute times of one machine mean nothing on another.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from trackstar.build import Silent, build_index, make_config
from trackstar.corpus import Corpus, CorpusConfig
from trackstar.encode import Encoder, Example, fold_factors, padded_length, plan_batches
from trackstar.index import COMPUTE_DTYPES
from trackstar.model import LoadedModel, load_model
from trackstar.passages import Cursor, read_passages
from trackstar.separable import SeparableScale

TRAIN, FLOOR, PADDED = "training step", "floor", "floor, padded"
CORRECTIONS = ("none", "Adafactor", "Adam, rank 1", "Adam, rank 2", "Adam, exact")
END_TO_END = "index, none"
SETTINGS = ("fixed", "mixed", "index")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Sizes of the model, the rows and the work."""

    layers: int = 4
    width: int = 256
    heads: int = 4
    vocabulary: int = 4096
    window: int = 128
    layer_blocks: int = 4
    rows: int = 16
    cols: int = 16
    batch_tokens: int = 2048
    passages: int = 32  # of the window's length, per turn
    mixed_passages: int = 512  # of the corpus' lengths, per turn
    index_passages: int = 512  # of the corpus, per turn of the whole build
    dtype: str = "float32"
    seed: int = 0


# Token ids int32 [T] of every passage of a turn.
Passages = Sequence[NDArray[np.int32]]


def make_fixture(folder: Path, settings: Settings, corpus: Sequence[str] | None, text_field: str) -> None:
    """Save corpus.jsonl, a tokenizer fitted to it, and a randomly initialised model of the wanted size."""
    if corpus is None:
        texts = synthetic_texts(2 * settings.index_passages + settings.mixed_passages, settings.seed)
    else:
        documents = Corpus(CorpusConfig(paths=tuple(corpus), text_field=text_field)).documents()
        texts = [document.text for document in documents]
        random.Random(settings.seed).shuffle(texts)
    for name, chosen in (("corpus", texts), ("turn", texts[: settings.index_passages])):
        lines = (json.dumps({"id": str(number), "text": text}) for number, text in enumerate(chosen))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    model = folder / "model"
    torch.manual_seed(settings.seed)
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "gpt_neox",
            vocab_size=settings.vocabulary,
            hidden_size=settings.width,
            intermediate_size=4 * settings.width,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            max_position_embeddings=settings.window,
        )
    ).save_pretrained(model)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts[:20_000], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    ).save_pretrained(model)


def synthetic_texts(count: int, seed: int) -> list[str]:
    """Sentences of made-up words; their number of words is log-normal around 20, as in encyclopedic prose."""
    generator = np.random.default_rng(seed)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    lexicon = ["".join(generator.choice(syllables, size)) for size in generator.integers(1, 4, 3000)]
    frequency = 1.0 / np.arange(1, len(lexicon) + 1)
    frequency /= frequency.sum()
    sizes = np.clip(np.exp(generator.normal(np.log(20), 0.6, count)), 3, 200).astype(int)
    return [" ".join(generator.choice(lexicon, size, p=frequency)) + "." for size in sizes]


def make_work(folder: Path, settings: Settings, setting: str, loaded: LoadedModel) -> Passages:
    """The tokens of one turn: random ids of the window's length, or passages of the corpus."""
    if setting == "fixed":
        shape = (settings.passages, settings.window)
        return list(np.random.default_rng(settings.seed).integers(0, settings.vocabulary, shape, dtype=np.int32))
    name, count = ("turn", None) if setting == "index" else ("corpus", settings.mixed_passages)
    corpus = Corpus(CorpusConfig(paths=(str(folder / f"{name}.jsonl"),)))
    stream = read_passages(
        corpus, loaded.tokenizer, window_tokens=settings.window, add_bos=True, start=Cursor(0, 0), first_id=0
    )
    return [passage.tokens for passage, _ in islice(stream, count)]


def contestant_names(setting: str) -> list[str]:
    """Who takes part at a setting."""
    if setting == "index":
        return [TRAIN, FLOOR, PADDED, END_TO_END]
    return [TRAIN, FLOOR, *([PADDED] if setting == "mixed" else []), *(f"rows, {name}" for name in CORRECTIONS)]


def make_contestant(
    folder: Path, settings: Settings, passages: Passages, loaded: LoadedModel, name: str
) -> Callable[[], Spent]:
    """One contestant with a model of its own; calling it does one turn's work and says what that took."""
    if name == END_TO_END:
        return partial(_index, folder, settings)
    own = replace(loaded, model=deepcopy(loaded.model))
    if name in (TRAIN, FLOOR, PADDED):
        lengths = [len(tokens) for tokens in passages]
        if name == PADDED:
            order = np.random.default_rng(settings.seed).permutation(len(passages)).tolist()
            # As many passages as fill the batch's tokens on average, so that padding comes on top.
            size = max(1, int(settings.batch_tokens / (sum(lengths) / len(lengths))))
            batches = [_batch(passages, order[i : i + size], tight=True) for i in range(0, len(order), size)]
        else:
            batches = [_batch(passages, indices) for indices in plan_batches(lengths, settings.batch_tokens)]
        return partial(_timed, partial(_train(own.model) if name == TRAIN else partial(_floor, own.model), batches))
    layout = own.layout(layer_blocks=settings.layer_blocks, rows=settings.rows, cols=settings.cols)
    correction = _correction(own, name.removeprefix("rows, "), settings.seed)
    encoder = Encoder(
        own,
        layout,
        fold_factors(own, layout, correction, seed=settings.seed),
        max_batch_tokens=settings.batch_tokens,
    )
    examples = [Example(tokens=tokens) for tokens in passages]
    return partial(_timed, partial(encoder.encode, examples))


def _batch(passages: Passages, indices: Sequence[int], *, tight: bool = False) -> tuple[Tensor, Tensor]:
    """Tokens and labels int64 [B, T]; padded as `encode` pads, or to the longest passage."""
    longest = max(len(passages[index]) for index in indices)
    tokens_BT = torch.zeros(len(indices), longest if tight else padded_length(longest), dtype=torch.int64)
    labels_BT = torch.full_like(tokens_BT, -100)
    for row, index in enumerate(indices):
        tokens = torch.from_numpy(passages[index].astype(np.int64))
        tokens_BT[row, : len(tokens)] = tokens
        labels_BT[row, : len(tokens)] = tokens
    return tokens_BT, labels_BT


def _train(model: Any) -> Callable[[Sequence[tuple[Tensor, Tensor]]], None]:
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def run(batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        for tokens_BT, labels_BT in batches:
            model(input_ids=tokens_BT, labels=labels_BT, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def _floor(model: Any, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
    for tokens_BT, labels_BT in batches:
        embeddings_BTH = model.get_input_embeddings()(tokens_BT).requires_grad_(True)
        model(inputs_embeds=embeddings_BTH, labels=labels_BT, use_cache=False).loss.backward()


def _correction(loaded: LoadedModel, name: str, seed: int) -> dict[str, SeparableScale | Tensor]:
    """V^(-1/2) of made-up positive moments; what they are changes no cost."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, SeparableScale | Tensor] = {}
    for member in loaded.members:
        m, n = member.out_features, member.in_features
        if name == "Adam, exact":
            found[member.name] = torch.rand(m, n, generator=generator) + 0.5
            continue
        terms = 2 if name == "Adam, rank 2" else 1
        out, in_ = (torch.rand(terms, size, generator=generator) + 0.5 for size in (m, n))
        if name == "none":
            out, in_ = torch.ones_like(out), torch.ones_like(in_)
        found[member.name] = SeparableScale(out=out, in_=in_, error=0.0)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Seconds of a turn by both clocks."""

    cpu_seconds: float
    wall_seconds: float


def _now() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def _timed(run: Callable[[], object]) -> Spent:
    cpu, wall = _now()
    run()
    after = _now()
    return Spent(cpu_seconds=after[0] - cpu, wall_seconds=after[1] - wall)


class _Stopwatch(Silent):
    """Times a build from the start of encoding to the last statistics; loading and coding are no work per token."""

    def __init__(self) -> None:
        self.started = self.ended = (0.0, 0.0)

    def start(
        self, step: str, done: int, total: int | None, *, tokens: int | None = None, unit: str = "passages"
    ) -> None:
        """Note when encoding begins."""
        if step == "encoding":
            self.started = _now()

    def advance(self, step: str, done: int, tokens: int) -> None:
        """Note when the latest rows went into R_train."""
        if step == "statistics":
            self.ended = _now()


def _index(folder: Path, settings: Settings) -> Spent:
    config = make_config(
        {
            "corpus": {"paths": (str(folder / "turn.jsonl"),)},
            "model": str(folder / "model"),
            "projection": {"layer_blocks": settings.layer_blocks, "rows": settings.rows, "cols": settings.cols},
            "code": {"store": "memory"},
            "background": 2,
            "max_batch_tokens": settings.batch_tokens,
            "compute_dtype": settings.dtype,
        }
    )
    watch = _Stopwatch()
    with tempfile.TemporaryDirectory(dir=folder) as out:
        build_index(config, out, progress=watch)
    (cpu, wall), (cpu_end, wall_end) = watch.started, watch.ended
    return Spent(cpu_seconds=cpu_end - cpu, wall_seconds=wall_end - wall)


def measure(
    contestants: dict[str, Callable[[], Spent]], *, rounds: int, clock: str, exact_every: int
) -> dict[str, dict[str, Any]]:
    """Let everyone take turns; per contestant the throughput relative to the training step and to the floor."""
    times: dict[str, dict[int, float]] = {name: {} for name in contestants}
    for name, run in contestants.items():
        if name != END_TO_END:  # it would only warm the page cache, and loads its model anew every time
            run()
    for number in range(rounds):
        turns = [name for name in contestants if "exact" not in name or number % exact_every == 0]
        random.Random(number).shuffle(turns)
        for name in turns:
            spent = contestants[name]()
            times[name][number] = spent.cpu_seconds if clock == "cpu" else spent.wall_seconds
    return {
        name: {
            "turns": len(times[name]),
            "median_seconds": statistics.median(times[name].values()),
            **{
                f"over_{key}": _quartiles([times[other][number] / spent for number, spent in times[name].items()])
                for key, other in (("training_step", TRAIN), ("floor", FLOOR))
            },
        }
        for name in contestants
    }


def _quartiles(ratios: Sequence[float]) -> list[float]:
    """Median, lower and upper quartile."""
    return [float(value) for value in np.quantile(ratios, [0.5, 0.25, 0.75])]


def memory_of(folder: Path, settings: Settings, setting: str, name: str) -> int:
    """Bytes of resident memory that one turn needs at its peak above the loaded, warm model. Linux only."""
    loaded = load_model(folder / "model", dtype=COMPUTE_DTYPES[settings.dtype])
    passages = make_work(folder, settings, setting, loaded)
    # One token through everything, so that the code of the libraries is resident before the line is drawn.
    _floor(deepcopy(loaded.model), [_batch([passages[0][:2]], [0])])
    model_bytes = sum(parameter.nbytes for parameter in loaded.model.parameters())
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status_bytes("VmRSS")
    make_contestant(folder, settings, passages, loaded, name)()
    # Contestants work on a copy of the loaded model.
    return _status_bytes("VmHWM") - before - model_bytes


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _memory_elsewhere(folder: Path, settings: Settings, threads: int, setting: str, name: str) -> int:
    command = [
        sys.executable,
        "-m",
        "benchmarks.index_speed",
        "--memory-of",
        name,
        "--settings",
        setting,
        "--folder",
        str(folder),
    ]
    command += ["--threads", str(threads)]
    for field in fields(Settings):
        command += [f"--{field.name.replace('_', '-')}", str(getattr(settings, field.name))]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def show(setting: str, found: dict[str, dict[str, Any]], console: Console) -> None:
    """Print one setting as a table."""
    table = Table("contestant", "/ training step", "/ floor", "quartiles", "peak MiB", "/ floor", title=setting)
    floor_bytes = found[FLOOR].get("peak_bytes")
    for name, values in found.items():
        step, (median, low, high) = values["over_training_step"][0], values["over_floor"]
        peak = values.get("peak_bytes")
        memory = (f"{peak / 2**20:.0f}", f"{peak / floor_bytes:.2f}") if peak and floor_bytes else ("", "")
        table.add_row(name, f"{step:.3f}", f"{median:.3f}", f"{low:.3f}-{high:.3f}", *memory)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables, write the JSON."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
    if options.memory_of:
        print(memory_of(Path(options.folder), settings, options.settings[0], options.memory_of))
        return
    clock = options.clock or ("cpu" if options.threads == 1 else "wall")
    report: dict[str, Any] = {
        **{field.name: getattr(settings, field.name) for field in fields(Settings)},
        "threads": options.threads,
        "clock": clock,
        "corpus": options.corpus or ["synthetic"],
    }
    with tempfile.TemporaryDirectory(prefix="trackstar-speed-") as name:
        folder = Path(name)
        make_fixture(folder, settings, options.corpus, options.text_field)
        for setting in options.settings:
            loaded = load_model(folder / "model", dtype=COMPUTE_DTYPES[settings.dtype])
            passages = make_work(folder, settings, setting, loaded)
            names = [known for known in contestant_names(setting) if not options.only or known in options.only]
            contestants = {
                known: make_contestant(folder, settings, passages, loaded, known)
                for known in dict.fromkeys([TRAIN, FLOOR, *names])
            }
            rounds = options.rounds
            found = measure(contestants, rounds=rounds, clock=clock, exact_every=options.exact_every)
            if options.memory and setting != "index":
                for known, values in found.items():
                    values["peak_bytes"] = _memory_elsewhere(folder, settings, options.threads, setting, known)
            report[setting] = found
            show(setting, found, Console(width=100))
            if options.json:
                Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Throughput and memory of indexing beside the floor.")
    parser.add_argument("--corpus", nargs="+", help="files or folders whose lengths to use; synthetic if left out")
    parser.add_argument("--text-field", default="text")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--only", nargs="+", help="contestants beside the training step and the floor")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--exact-every", type=int, default=4, help="rounds per turn of the slow exact correction")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=("cpu", "wall"), help="cpu with one thread, else wall")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    for field in fields(Settings):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    return parser


if __name__ == "__main__":
    main()
