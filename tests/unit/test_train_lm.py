"""The training example: packing, schedule, refusals, and that a seed fixes the weights and the folder it writes."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trackstar.errors import InvalidRequest


def _load_example() -> Any:
    path = Path(__file__).parents[2] / "examples" / "train_lm.py"
    spec = importlib.util.spec_from_file_location("train_lm_example", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


train_lm = _load_example()

SIZES = ["--layers", "1", "--width", "16", "--heads", "2", "--vocab", "280", "--context", "16"]
RUN = ["--batch-tokens", "64", "--lr", "1e-2", "--steps", "8", "--log-every", "1", "--holdout", "0.1"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    lines = [f"The river number {i} runs past the town of {chr(65 + i % 26)}stad." for i in range(60)]
    path.write_text("".join(json.dumps({"body": line}) + "\n" for line in lines), encoding="utf-8")
    return path


def run(corpus: Path, out: Path, *options: str) -> dict[str, Any]:
    argv = [str(corpus), "--out", str(out), "--text-field", "body", *SIZES, *RUN, *options]
    report: dict[str, Any] = train_lm.train(train_lm.parse(argv))
    return report


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_seed_fixes_the_weights_and_the_folder_needs_no_pickle(corpus: Path, tmp_path: Path) -> None:
    report = run(corpus, tmp_path / "a", "--save-every", "4")
    run(corpus, tmp_path / "b")
    run(corpus, tmp_path / "c", "--seed", "1", "--tokenizer", str(tmp_path / "a"))
    first, second, other = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)

    losses = [entry["loss"] for entry in report["log"] if "loss" in entry]
    assert losses[-1] < losses[0] - 0.2
    written = json.loads((tmp_path / "a" / "training.json").read_text(encoding="utf-8"))
    assert written["log"] == report["log"]
    assert written["held_out_loss"] == report["held_out_loss"] > 0
    assert report["documents"] == 54
    assert report["tokens_seen"] == 8 * 64
    for folder in (tmp_path / "a", tmp_path / "a" / "checkpoint-4"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(folder))
        assert not (folder / "training_args.bin").exists()
        state = torch.load(folder / "optimizer.pt", weights_only=True)
        order = [index for group in state["param_groups"] for index in group["params"]]
        parameters = dict(model.named_parameters())
        assert len(order) == len(parameters)
        shapes = sorted(state["state"][index]["exp_avg_sq"].shape for index in order)
        assert shapes == sorted(parameter.shape for parameter in parameters.values())
        torch.load(folder / "scheduler.pt", weights_only=True)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_adafactor_keeps_factored_moments(corpus: Path, tmp_path: Path, arch: str) -> None:
    run(corpus, tmp_path / "out", "--arch", arch, "--optim", "adafactor", "--tie", "--steps", "2", "--holdout", "0")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.model_type == arch
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    state = torch.load(tmp_path / "out" / "optimizer.pt", weights_only=True)
    assert state["param_groups"][0]["scale_parameter"] is False
    assert state["param_groups"][0]["relative_step"] is False
    assert {"exp_avg_sq_row", "exp_avg_sq_col"} <= set(state["state"][0])


def test_the_clock_ends_a_run_with_a_time_budget(corpus: Path, tmp_path: Path) -> None:
    ticks = itertools.count()
    argv = [str(corpus), "--out", str(tmp_path / "out"), "--text-field", "body", *SIZES, "--batch-tokens", "64"]
    config = train_lm.parse([*argv, "--max-seconds", "20"])
    report = train_lm.train(config, clock=lambda: float(next(ticks)))
    assert 1 <= report["steps"] <= 20
    assert (
        json.loads((tmp_path / "out" / "trainer_state.json").read_text(encoding="utf-8"))["max_steps"]
        == report["steps"]
    )


def test_packing_drops_only_the_tail_and_shows_each_document_once_an_epoch() -> None:
    lengths = [3, 5, 2, 7, 4]
    tokens = np.arange(sum(lengths), dtype=np.int32)
    starts = np.cumsum([0, *lengths], dtype=np.int64)
    documents = train_lm.TokenizedDocuments(tokens=tokens, starts=starts)
    blocks = train_lm.PackedBlocks(documents, context=4, seed=0)
    stream = torch.cat([block["input_ids"] for block in itertools.islice(blocks, 10)]).numpy()
    first, second = stream[:21], stream[21:]
    assert sorted(first) == list(tokens)
    assert len(set(second)) == len(second)
    assert list(first[: len(second)]) != list(second)
    # Documents stay whole: within an epoch a token that opens no document follows its predecessor.
    assert all(b == a + 1 or b in starts for a, b in itertools.pairwise(first))


def test_tokens_open_with_bos_and_a_text_comes_back(corpus: Path) -> None:
    tokenizer = train_lm.train_tokenizer(["Zoë’s café\n\ttabs", "plain"] * 9, 270)
    documents = train_lm.tokenize(["Zoë’s café\n\ttabs", "plain"], tokenizer)
    assert list(documents.tokens[documents.starts[:-1]]) == [tokenizer.bos_token_id] * 2
    assert tokenizer.decode(documents.tokens[1 : documents.starts[1]]) == "Zoë’s café\n\ttabs"
    assert len(tokenizer("plain")["input_ids"]) == len(tokenizer("plain", add_special_tokens=False)["input_ids"])
    head, rest = documents.split(1)
    assert [len(head), len(rest)] == [1, 1]
    assert list(rest.tokens) == list(documents.tokens[documents.starts[1] :])


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    factors = [train_lm.cosine_multiplier(step / 100, 0.1) for step in range(101)]
    assert factors[0] == 0.0
    assert factors[5] == pytest.approx(0.5)
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0.0)
    assert train_lm.cosine_multiplier(1.3, 0.1) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 1.0}, "exactly one"),
        ({"steps": None}, "exactly one"),
        ({"width": 10, "heads": 4}, "multiple"),
        ({"vocab": 100}, "--vocab is 100"),
        ({"batch_tokens": 8}, "--batch-tokens 8"),
        ({"holdout": 1.0}, "--holdout 1.0"),
        ({"log_every": 0}, "--log-every is 0"),
        ({"steps": None, "epochs": 0.001}, "do not fill one batch"),
        ({"steps": None, "epochs": 1.0, "holdout": 0.999}, "do not fill one batch"),
    ],
)
def test_refuses(corpus: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    argv = [str(corpus), "--out", str(tmp_path / "out"), "--text-field", "body", *SIZES, *RUN]
    with pytest.raises(InvalidRequest, match=message):
        train_lm.train(dataclasses.replace(train_lm.parse(argv), **change))


def test_refuses_a_folder_with_files(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="not empty"):
        run(corpus, tmp_path)


def test_the_command_line_prints_one_sentence(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = train_lm.main([str(corpus), "--out", str(tmp_path / "out"), "--steps", "1"])
    assert code == 2
    assert "train_lm: " in capsys.readouterr().err
