"""Trains a small causal language model on a corpus and keeps the optimizer state that attribution uses.

Contract: reads any corpus `trackstar.corpus.Corpus` reads and writes a Hugging Face checkpoint folder: config.json,
model.safetensors, tokenizer.json, tokenizer_config.json, optimizer.pt, scheduler.pt, trainer_state.json, training.json.
The two .pt files load with `torch.load(weights_only=True)`. Documents are packed as bos + tokens into blocks of
`--context` tokens, in a new order each epoch; the stream runs on from one epoch into the next, so only the tail of the
last batch is dropped. Everything is float32 on one device. Same corpus, options and thread count give the same weights,
except with `--max-seconds`, where the clock decides the length of the run.

What it does not do: it keeps all tokens of the corpus in memory (4 bytes each), does not resume, does not use several
devices (hide all but one with CUDA_VISIBLE_DEVICES), and is no recipe for a good language model.

Example:
    python examples/train_lm.py corpus.jsonl --out model --arch gpt_neox --epochs 10
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from trackstar.corpus import Corpus, CorpusConfig
from trackstar.errors import InvalidRequest, TrackstarError

END_OF_TEXT = "<|endoftext|>"
TOKENIZE_BATCH = 1000  # documents handed to the tokenizer at once
TRAINING_ARGS = "training_args.bin"  # a pickle of Trainer classes; training.json says the same
UNBOUNDED_STEPS = 2**31 - 1  # the Trainer wants a number; with a time budget the clock stops the run


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Every option of a run; exactly one of `epochs`, `steps`, `max_seconds` is set."""

    corpus: tuple[str, ...]  # files, folders or URLs, as CorpusConfig.paths
    out: Path  # new or empty folder
    arch: str = "gpt_neox"  # one of ARCHITECTURES
    layers: int = 4
    width: int = 256  # hidden size; a multiple of `heads`
    heads: int = 4
    vocab: int = 4096  # tokens of the new tokenizer, at least 257; not used with `tokenizer`
    tokenizer: str | None = None  # folder of an existing tokenizer
    context: int = 128  # tokens per block
    tie: bool = False  # share input and output embeddings
    epochs: float | None = None
    steps: int | None = None
    max_seconds: float | None = None  # wall time of training; the schedule follows the clock
    batch_tokens: int = 6144  # tokens per optimizer step, rounded down to whole blocks
    lr: float = 1e-3  # peak
    warmup: float = 0.03  # part of the run, 0 to below 1
    weight_decay: float = 0.01
    optim: str = "adamw"  # adamw or adafactor
    seed: int = 0
    threads: int = 1  # CPU threads
    text_field: str = "text"
    save_every: int = 0  # steps between kept checkpoints; 0 keeps the last state only
    log_every: int = 50  # steps
    holdout: float = 0.01  # part of the documents, from the end, that is only evaluated; 0 to below 1


ARCHITECTURES = ("gpt_neox", "llama", "gpt2")
OPTIMIZERS = {"adamw": "adamw_torch_fused", "adafactor": "adafactor"}  # the Trainer's names


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedDocuments:
    """Documents as one run of tokens: document i is tokens[starts[i]:starts[i + 1]], bos included."""

    tokens: NDArray[np.int32]  # [T]
    starts: NDArray[np.int64]  # [N + 1]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def split(self, first: int) -> tuple[TokenizedDocuments, TokenizedDocuments]:
        """Documents before `first`, and the rest."""
        cut = self.starts[first]
        head = TokenizedDocuments(tokens=self.tokens[:cut], starts=self.starts[: first + 1])
        return head, TokenizedDocuments(tokens=self.tokens[cut:], starts=self.starts[first:] - cut)

    def shuffled(self, seed: int, epoch: int) -> NDArray[np.int32]:
        """All tokens [T], documents in the order of this epoch."""
        order = np.random.default_rng((seed, epoch)).permutation(len(self))
        return np.concatenate([self.tokens[self.starts[i] : self.starts[i + 1]] for i in order])


class PackedBlocks(IterableDataset[dict[str, torch.Tensor]]):
    """Blocks of `context` tokens without end: epoch after epoch, the tail of one running on into the next.

    Yields input_ids and labels, int64 [context].
    """

    def __init__(self, documents: TokenizedDocuments, *, context: int, seed: int) -> None:
        self.documents = documents
        self.context = context
        self.seed = seed

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        tail = np.empty(0, dtype=np.int32)
        for epoch in itertools.count():
            stream = np.concatenate([tail, self.documents.shuffled(self.seed, epoch)])
            num_blocks = len(stream) // self.context
            for block in stream[: num_blocks * self.context].reshape(num_blocks, self.context):
                yield example(block)
            tail = stream[num_blocks * self.context :]


def example(block: NDArray[np.int32]) -> dict[str, torch.Tensor]:
    """One block as the model takes it; the model shifts the labels itself."""
    ids = torch.from_numpy(block.astype(np.int64))
    return {"input_ids": ids, "labels": ids.clone()}


def model_config(config: TrainConfig, *, vocab: int, bos: int) -> PreTrainedConfig:
    """The architecture's configuration, without dropout, for contexts up to `config.context`."""
    width = config.width
    sizes: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": config.layers}
    sizes |= {"num_attention_heads": config.heads, "max_position_embeddings": config.context}
    if config.arch == "gpt2":
        sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    elif config.arch == "llama":
        # Two thirds of 4 * width keep the gated MLP at the parameter count of the others; rounded up to 16.
        sizes |= {"num_key_value_heads": config.heads, "intermediate_size": math.ceil(8 * width / 48) * 16}
    else:
        sizes |= {"intermediate_size": 4 * width}
    shared = {"vocab_size": vocab, "bos_token_id": bos, "eos_token_id": bos, "tie_word_embeddings": config.tie}
    made: PreTrainedConfig = AutoConfig.for_model(config.arch, **sizes, **shared)
    return made


def evaluation_blocks(tokens: NDArray[np.int32], context: int) -> list[dict[str, torch.Tensor]]:
    """Whole blocks in order, or one shorter block where there are fewer tokens; none where there are none."""
    if len(tokens) < context:
        return [example(tokens)] if len(tokens) else []
    return [example(tokens[i : i + context]) for i in range(0, len(tokens) - context + 1, context)]


def train_tokenizer(texts: Iterable[str], vocab: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `vocab` tokens; adds no special tokens by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def boundary_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that opens each document: bos, else eos. Raises InvalidRequest when the tokenizer has neither."""
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(token_id, int):
            return token_id
    raise InvalidRequest("The tokenizer has neither a bos nor an eos token; give it one or leave --tokenizer out.")


def tokenize(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> TokenizedDocuments:
    """Each text as bos + tokens."""
    bos = boundary_token(tokenizer)
    pieces: list[NDArray[np.int32]] = []
    texts = iter(texts)
    while batch := list(itertools.islice(texts, TOKENIZE_BATCH)):
        # verbose=False: a document longer than the context is cut into blocks, so the length warning misleads.
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            pieces.append(np.array([bos, *ids], dtype=np.int32))
    starts = np.cumsum([0, *(len(piece) for piece in pieces)], dtype=np.int64)
    return TokenizedDocuments(tokens=np.concatenate(pieces), starts=starts)


def cosine_multiplier(progress: float, warmup: float) -> float:
    """Learning-rate factor at `progress` (0 to 1) of the run: linear to 1 over `warmup`, then half a cosine to 0."""
    progress = min(progress, 1.0)
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (progress - warmup) / (1.0 - warmup)))


class ScheduledTrainer(Trainer):
    """The Trainer with a learning rate that follows `progress` (step number to part of the run done)."""

    progress: Callable[[int], float]
    warmup: float

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """Called once by the Trainer; the number of steps it passes is not used."""
        if self.lr_scheduler is None:
            assert self.optimizer is not None  # the Trainer makes it first
            # A step taken at progress 0 would be wasted, so each step uses the rate of its end.
            self.lr_scheduler = LambdaLR(
                self.optimizer, lambda step: cosine_multiplier(self.progress(step + 1), self.warmup)
            )
        return self.lr_scheduler

    def save_final(self, folder: Path) -> None:
        """The files of one of the Trainer's checkpoints, less its pickled arguments and random states."""
        self.save_model(str(folder))
        (folder / TRAINING_ARGS).unlink()
        self._save_optimizer_and_scheduler(str(folder))
        self.state.save_to_json(str(folder / "trainer_state.json"))


class StopWhenDone(TrainerCallback):
    """Ends the run when its progress reaches 1, and keeps pickled arguments out of the checkpoints."""

    def __init__(self, progress: Callable[[int], float]) -> None:
        self.progress = progress

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.progress(state.global_step) >= 1.0:
            state.max_steps = state.global_step
            control.should_training_stop = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        (Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / TRAINING_ARGS).unlink(missing_ok=True)


def clock_progress(max_seconds: float, clock: Callable[[], float]) -> Callable[[int], float]:
    """Progress by wall time, from the first call on."""
    started: list[float] = []

    def progress(step: int) -> float:
        if not started:
            started.append(clock())
        return (clock() - started[0]) / max_seconds

    return progress


def check(config: TrainConfig) -> None:
    """Raises InvalidRequest for options that do not fit together."""
    if sum(limit is not None for limit in (config.epochs, config.steps, config.max_seconds)) != 1:
        raise InvalidRequest("Give exactly one of --epochs, --steps and --max-seconds.")
    for name in ("epochs", "steps", "max_seconds", "layers", "width", "heads", "context", "lr", "threads", "log_every"):
        if (value := getattr(config, name)) is not None and value <= 0:
            raise InvalidRequest(f"--{name.replace('_', '-')} is {value}; give a number above 0.")
    if config.width % config.heads:
        raise InvalidRequest(f"--width {config.width} is not a multiple of --heads {config.heads}; change one of them.")
    if config.tokenizer is None and config.vocab < 257:
        raise InvalidRequest(f"--vocab is {config.vocab}; a byte-level vocabulary needs at least 257 tokens.")
    if config.batch_tokens < config.context:
        raise InvalidRequest(f"--batch-tokens {config.batch_tokens} is less than one block of {config.context} tokens.")
    if not (0.0 <= config.holdout < 1.0 and 0.0 <= config.warmup < 1.0):
        raise InvalidRequest(f"--holdout {config.holdout} and --warmup {config.warmup} must be from 0 to below 1.")
    if config.out.exists() and any(config.out.iterdir()):
        raise InvalidRequest(f"The folder {config.out} is not empty; give a new one to --out.")


def train(config: TrainConfig, *, clock: Callable[[], float] = time.monotonic) -> dict[str, Any]:
    """Runs the training and writes `config.out`; returns what training.json holds (losses in nats per token).

    Raises InvalidRequest for options that do not fit together or a corpus too small, and what Corpus raises.
    """
    check(config)
    torch.set_num_threads(config.threads)
    set_seed(config.seed)
    corpus = Corpus(CorpusConfig(paths=config.corpus, text_field=config.text_field))

    def texts() -> Iterator[str]:
        return (document.text for document in corpus.documents())

    tokenizer: PreTrainedTokenizerBase = (
        AutoTokenizer.from_pretrained(config.tokenizer) if config.tokenizer else train_tokenizer(texts(), config.vocab)
    )
    bos = boundary_token(tokenizer)
    tokenizer.model_max_length = config.context
    documents = tokenize(texts(), tokenizer)
    num_held_out = math.ceil(config.holdout * len(documents))
    training, held_out = documents.split(len(documents) - num_held_out)

    rows = config.batch_tokens // config.context
    step_tokens = rows * config.context
    max_steps, progress = UNBOUNDED_STEPS, clock_progress(config.max_seconds or 1.0, clock)
    if config.max_seconds is None:
        max_steps = config.steps or int(config.epochs * len(training.tokens) // step_tokens if config.epochs else 0)
        if not len(training) or max_steps == 0:
            raise InvalidRequest(
                f"{len(training.tokens)} training tokens do not fill one batch of {step_tokens};"
                " give more text, more --epochs or fewer --batch-tokens."
            )

        def progress(step: int) -> float:
            return step / max_steps

    eval_blocks = evaluation_blocks(held_out.tokens, config.context)
    model = AutoModelForCausalLM.from_config(model_config(config, vocab=len(tokenizer), bos=bos), dtype=torch.float32)

    trainer = ScheduledTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(config.out),
            max_steps=max_steps,
            per_device_train_batch_size=rows,
            per_device_eval_batch_size=rows,
            learning_rate=config.lr,
            weight_decay=config.weight_decay,
            optim=OPTIMIZERS[config.optim],
            seed=config.seed,
            logging_steps=config.log_every,
            save_strategy="steps" if config.save_every else "no",
            save_steps=config.save_every or 1,
            eval_strategy="steps" if config.save_every and eval_blocks else "no",
            eval_steps=config.save_every or 1,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            remove_unused_columns=False,
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=PackedBlocks(training, context=config.context, seed=config.seed),
        eval_dataset=eval_blocks or None,
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=[StopWhenDone(progress)],
    )
    trainer.progress, trainer.warmup = progress, config.warmup
    print(
        f"{len(training)} documents of {len(training.tokens)} tokens, {len(held_out)} held out,"
        f" {sum(p.numel() for p in model.parameters())} parameters, batches of {rows} x {config.context} tokens",
        flush=True,
    )
    start = clock()
    outcome = trainer.train()
    seconds = clock() - start
    eval_loss = trainer.evaluate()["eval_loss"] if eval_blocks else None

    trainer.save_final(config.out)
    steps = trainer.state.global_step
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    report = {
        "config": dataclasses.asdict(config) | {"out": str(config.out)},
        "documents": len(training),
        "held_out_documents": len(held_out),
        "corpus_tokens": len(training.tokens),
        "held_out_tokens": len(held_out.tokens),
        "steps": steps,
        "tokens_seen": steps * step_tokens,
        "epochs_seen": steps * step_tokens / len(training.tokens),
        "seconds": seconds,
        "tokens_per_second": steps * step_tokens / seconds,
        "mean_train_loss": outcome.training_loss,
        "last_train_loss": losses[-1]["loss"] if losses else outcome.training_loss,
        "held_out_loss": eval_loss,
        "log": trainer.state.log_history,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    (config.out / "training.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def parse(argv: Sequence[str] | None) -> TrainConfig:
    """The command line as a TrainConfig."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("corpus", nargs="+", help="files, folders or URLs")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the checkpoint")
    choices = {"arch": ARCHITECTURES, "optim": tuple(OPTIMIZERS)}
    types = {"epochs": float, "steps": int, "max_seconds": float, "tokenizer": str}
    parser.add_argument("--tie", action="store_true", help="share input and output embeddings")
    for field in dataclasses.fields(TrainConfig):
        if field.name not in ("corpus", "out", "tie"):
            flag, kind = "--" + field.name.replace("_", "-"), types.get(field.name, type(field.default))
            help_text = f"default {field.default}"
            parser.add_argument(flag, type=kind, default=field.default, choices=choices.get(field.name), help=help_text)
    options = vars(parser.parse_args(argv))
    return TrainConfig(**options | {"corpus": tuple(options["corpus"])})


def main(argv: Sequence[str] | None = None) -> int:
    config = parse(argv)
    # The tokenizer's own threads; read at its first use.
    os.environ.setdefault("RAYON_NUM_THREADS", str(config.threads))
    try:
        report = train(config)
    except TrackstarError as error:
        print(f"train_lm: {error}", file=sys.stderr)
        return error.exit_code
    print({key: report[key] for key in ("steps", "tokens_per_second", "last_train_loss", "held_out_loss")})
    return 0


if __name__ == "__main__":
    sys.exit(main())
