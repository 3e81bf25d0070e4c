"""Encode: tokens in, un-whitened gradient rows out. Read this file first.

    row(z) = P_d ( grad Loss(z) / sqrt(V) )          [d], float32

An `Encoder` holds a frozen model, the folded projections and the hooks. `encode` batches examples of equal padded
length, runs one forward and one backward pass per batch and returns one row per example in the order given.
`contributions` runs the same pass and returns how much every token and block adds to the inner product with a query.

Reproducibility: the padded length of an example depends on its own length only, and no matrix product ever has fewer
rows than where kernels change their summation order. On the CPU kernels this was measured with (see
tests/unit/test_encode.py) rows are therefore bitwise independent of batch size, order and neighbours. Experts of a
mixture see token counts that depend on the batch, so there (and on GPUs) rows agree to rounding only.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trackstar import loss
from trackstar.capture import Capture, Factors, RoutedTokens, RowSink, Sink, TokenSink
from trackstar.errors import InvalidRequest, UnsupportedModel
from trackstar.loss import MIN_KERNEL_ROWS, Objective, cross_entropy
from trackstar.model import LoadedModel
from trackstar.projection import BlockLayout, normal_factor
from trackstar.separable import SeparableScale

AnySink = TypeVar("AnySink", bound=Sink)

_PROBE_TOKENS = 32
_ROUTED_EXPERT = re.compile(r"experts?\.\d+\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """Tokens int32 [T]; the loss counts from `first_target` on: 1 for a passage, the prompt's length for a query."""

    tokens: NDArray[np.int32]
    first_target: int = 1

    @property
    def num_targets(self) -> int:
        """Number of tokens whose prediction counts."""
        return max(0, len(self.tokens) - max(1, self.first_target))


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """Rows float32 [N, d] and the summed loss float32 [N] of N examples, in the order they were given."""

    rows_ND: Tensor
    loss_N: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Contributions:
    """Shares of <row, query>: `by_token_Tb` [T, blocks], plus `unplaced_b` [blocks] from experts whose tokens are not
    known."""

    by_token_Tb: Tensor
    unplaced_b: Tensor

    @property
    def total(self) -> float:
        """The inner product itself, float64 sum of all shares."""
        return float(self.by_token_Tb.double().sum() + self.unplaced_b.double().sum())


def fold_factors(
    loaded: LoadedModel, layout: BlockLayout, correction: Mapping[str, SeparableScale | Tensor], *, seed: int
) -> dict[str, Factors]:
    """Fold the optimizer correction into the projection of every weight matrix.

    Args:
        loaded: the model with its members.
        layout: the blocks of a row.
        correction: V^(-1/2) by weight name: separable, or an elementwise [m, n] matrix that is applied to every
            per-example gradient (exact and slow: the gradients are formed).
        seed: the projection's seed.
    """
    device, dtype = loaded.model.device, loaded.model.dtype
    factors: dict[str, Factors] = {}
    for member in loaded.members:
        index = loaded.block_of(member, layout)
        block = layout.blocks[index]
        out_mp = normal_factor(seed=seed, name=member.name, side="out", size=block.rows, features=member.held_out)
        in_nq = normal_factor(seed=seed, name=member.name, side="in", size=block.cols, features=member.held_in)
        scale = correction[member.name]
        out_held, in_held = _slice(member.held_out), _slice(member.held_in)
        elementwise: Tensor | None = None
        terms = 1
        if isinstance(scale, Tensor):
            elementwise = scale[out_held, in_held].to(device, dtype, copy=member.cut is not None)
        else:
            terms = scale.out.shape[0]
            out_mp, in_nq = _fold(out_mp, scale.out[:, out_held]), _fold(in_nq, scale.in_[:, in_held])
        factors[member.name] = Factors(
            name=member.name,
            block=index,
            terms=terms,
            out=out_mp.to(device, dtype),
            in_=in_nq.to(device, dtype),
            elementwise=elementwise,
        )
    return factors


def _slice(features: range) -> slice:
    return slice(features.start, features.stop)


def _fold(factor_fp: Tensor, scale_Kf: Tensor) -> Tensor:
    """[features, p] and [K, features] to [features, K * p], term by term."""
    return torch.cat([factor_fp * scale_f[:, None] for scale_f in scale_Kf], dim=1)


# Queries are short and come a few at a time: whole groups of lengths share a pass rather than each length its own.
QUERY_LENGTH_STEP = 8


def padded_length(num_tokens: int, *, step: int = 1, limit: int | None = None) -> int:
    """Length that an example is padded to: a function of its own length alone.

    Args:
        num_tokens: its length.
        step: padded lengths are multiples of this; with 1, at most 1/32 is added.
        limit: the model's window, which no padding exceeds.
    """
    step = max(step, 1 << max(0, (num_tokens // 32).bit_length() - 1))
    padded = -(-num_tokens // step) * step
    return padded if limit is None else max(num_tokens, min(padded, limit))


def plan_batches(
    lengths: Sequence[int], max_batch_tokens: int, *, step: int = 1, limit: int | None = None
) -> Iterator[list[int]]:
    """Indices of examples that share a padded length, longest first, at most `max_batch_tokens` padded tokens a
    batch; `step` and `limit` as of `padded_length`."""
    by_length: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        by_length.setdefault(padded_length(length, step=step, limit=limit), []).append(index)
    for length in sorted(by_length, reverse=True):
        indices = by_length[length]
        size = max(1, max_batch_tokens // length)
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


class Encoder:
    """Turns examples into rows with one model; installs its hooks on construction.

    Args:
        loaded: the model.
        layout: blocks of a row.
        factors: the folded projection of every weight matrix.
        max_batch_tokens: padded tokens of one pass.
        head_chunk_tokens: target positions per pass through the head.
        objective: what is summed over target tokens.
        length_step: padded lengths are multiples of this; larger ones join more examples in a pass.

    Raises:
        UnsupportedModel: a module that should contribute received no gradient in a probe pass; the message names it.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        layout: BlockLayout,
        factors: Mapping[str, Factors],
        *,
        max_batch_tokens: int = 8192,
        head_chunk_tokens: int = 1024,
        objective: Objective = cross_entropy,
        length_step: int = 1,
    ) -> None:
        self.loaded = loaded
        self.layout = layout
        self.max_batch_tokens = max_batch_tokens
        self._head_chunk_tokens = head_chunk_tokens
        self._objective = objective
        self._length_step = length_step
        self._capture = Capture(loaded, layout, factors)
        self._one_by_one = False
        self._probe()

    def close(self) -> None:
        """Remove the hooks from the model."""
        self._capture.remove()

    def encode(self, examples: Sequence[Example], *, on_batch: Callable[[int], None] | None = None) -> Encoded:
        """Rows and losses of `examples`.

        Args:
            examples: at least two tokens each are needed for a gradient; shorter ones give a zero row.
            on_batch: called with the number of tokens that this rank ran after each batch.

        Raises:
            InvalidRequest: an example is empty or longer than the model's window.
        """
        device = self.loaded.model.device
        rows_ND = torch.zeros(len(examples), self.layout.dim, dtype=torch.float32, device=device)
        loss_N = torch.zeros(len(examples), dtype=torch.float32, device=device)

        def make(num_examples: int, _num_tokens: int) -> RowSink:
            return RowSink(self.layout, num_examples=num_examples, num_sites=self._capture.num_sites, device=device)

        for indices, sink, losses_B in self.run(examples, make):
            where = torch.tensor(indices, dtype=torch.long, device=device)
            rows_ND[where] = sink.finish()[: len(indices)]
            loss_N[where] = losses_B
            if on_batch is not None:
                on_batch(sum(len(examples[index].tokens) for index in indices))
        self.loaded.ranks.sum_(rows_ND)
        if self.loaded.ranks.num_dealt > 1:
            self.loaded.ranks.sum_(loss_N)
        return Encoded(rows_ND=rows_ND, loss_N=loss_N)

    def contributions(self, examples: Sequence[Example], query_d: Tensor) -> list[Contributions]:
        """How every token and block of each example adds to <row, query_d>; query_d is float32 [d], un-normalised."""
        query_d = query_d.to(self.loaded.model.device)
        starts = [0, *itertools.accumulate(len(example.tokens) for example in examples)]
        by_token_Sb = query_d.new_zeros(starts[-1], len(self.layout.blocks))
        unplaced_Nb = query_d.new_zeros(len(examples), len(self.layout.blocks))

        def make(num_examples: int, num_tokens: int) -> TokenSink:
            return TokenSink(self.layout, num_examples=num_examples, num_tokens=num_tokens, query_d=query_d)

        for indices, sink, _ in self.run(examples, make):
            for position, index in enumerate(indices):
                tokens = slice(starts[index], starts[index + 1])
                by_token_Sb[tokens] = sink.contributions_BTb[position, : len(examples[index].tokens)]
                unplaced_Nb[index] = sink.unplaced_Bb[position]
        for part in (by_token_Sb, unplaced_Nb):
            self.loaded.ranks.sum_(part)
        return [
            Contributions(by_token_Tb=by_token_Tb, unplaced_b=unplaced_b)
            for by_token_Tb, unplaced_b in zip(
                by_token_Sb.cpu().split([len(example.tokens) for example in examples]), unplaced_Nb.cpu(), strict=True
            )
        ]

    def run(
        self, examples: Sequence[Example], make_sink: Callable[[int, int], AnySink]
    ) -> Iterator[tuple[list[int], AnySink, Tensor]]:
        """Forward and backward batch by batch, each into a new sink.

        Of a model that several ranks hold, sinks receive this rank's part; parts are made whole by summing them.

        Args:
            examples: what to run.
            make_sink: makes the sink of a batch from its padded (number of examples, number of tokens).

        Yields:
            Indices of the batch's examples (this rank's, if they are dealt), its sink (rows behind these are padding),
            and their losses float32 [B].

        Raises:
            InvalidRequest: an example is empty or longer than the model's window.
        """
        self._check(examples)
        for batch in self._batches(examples):
            longest = max(len(examples[index].tokens) for index in batch)
            length = padded_length(longest, step=self._length_step, limit=self.loaded.max_tokens)
            indices = self.loaded.ranks.mine(batch)
            tokens_BT, is_target_BT = self._pad([examples[index] for index in indices], length)
            num_examples, num_tokens = tokens_BT.shape
            sink = make_sink(num_examples, num_tokens)
            with self._capture.into(sink, num_examples=num_examples, num_tokens=num_tokens):
                losses_B = self._backward(tokens_BT, is_target_BT)
            yield indices, sink, losses_B[: len(indices)]

    def _backward(self, tokens_BT: Tensor, is_target_BT: Tensor) -> Tensor:
        return loss.backward(
            self.loaded.model,
            tokens_BT,
            is_target_BT,
            objective=self._objective,
            chunk_tokens=self._head_chunk_tokens,
        )

    def _batches(self, examples: Sequence[Example]) -> Iterator[list[int]]:
        if self._one_by_one:
            return iter([[index] for index in range(len(examples))])
        max_batch_tokens = self.max_batch_tokens * self.loaded.ranks.num_dealt
        lengths = [len(example.tokens) for example in examples]
        return plan_batches(lengths, max_batch_tokens, step=self._length_step, limit=self.loaded.max_tokens)

    def _pad(self, batch: Sequence[Example], length: int) -> tuple[Tensor, Tensor]:
        """Tokens int64 [B, T] and target mask bool [B, T], with dummy examples where B * T would be too small."""
        num_rows = max(len(batch), 1 if self._one_by_one else -(-MIN_KERNEL_ROWS // length))
        tokens_BT = np.zeros((num_rows, length), dtype=np.int64)
        is_target_BT = np.zeros((num_rows, length), dtype=bool)
        for row, example in enumerate(batch):
            tokens_BT[row, : len(example.tokens)] = example.tokens
            is_target_BT[row, max(1, example.first_target) : len(example.tokens)] = True
        device = self.loaded.model.device
        return torch.from_numpy(tokens_BT).to(device), torch.from_numpy(is_target_BT).to(device)

    def _check(self, examples: Sequence[Example]) -> None:
        for index, example in enumerate(examples):
            if not len(example.tokens):
                raise InvalidRequest(f"example {index} has no tokens")
            if len(example.tokens) > self.loaded.max_tokens:
                raise InvalidRequest(
                    f"example {index} has {len(example.tokens)} tokens, more than the model's window of "
                    f"{self.loaded.max_tokens}; shorten it"
                )

    def _probe(self) -> None:
        """Run a few tokens through the model: every contributing module must receive a gradient."""
        vocabulary = int(self.loaded.model.config.get_text_config().vocab_size)
        num_tokens = min(_PROBE_TOKENS, self.loaded.max_tokens)
        tokens = np.random.Generator(np.random.Philox(key=0)).integers(0, vocabulary, (2, num_tokens), dtype=np.int32)
        examples = [Example(tokens=row) for row in tokens]
        with self._capture.watching() as seen:
            try:
                self.encode(examples)
            except RoutedTokens:
                self._one_by_one = True
                self.encode(examples)
        for member in self.loaded.members:
            if member.module_name not in seen and not (self._one_by_one and _ROUTED_EXPERT.search(member.module_name)):
                raise UnsupportedModel(
                    f"{member.module_name!r} should contribute but received no gradient in a probe pass; "
                    f"leave it out on purpose with --exclude {member.module_name!r}"
                )
