"""Capture: projected per-example gradients out of one forward and one backward pass, without any weight gradient.

For a weight matrix with inputs a [B, T, n] and output gradients delta [B, T, m] the gradient of example b is
G = delta_b^T a_b, and with the folded factors L' = L diag(s_out) and R' = R diag(s_in)

    L (G o S) R^T = sum_k (delta_b L'_k^T)^T (a_b R'_k^T)          S = sum_k s_out,k s_in,k^T ~ V^(-1/2)

so only u = delta L'^T [B, T, K*p] and v = a R'^T [B, T, K*q] are ever needed. A `Sink` receives u and v of every weight
matrix: `RowSink` contracts them to rows, `TokenSink` to the contribution of each token to a given query.

Contract: hooks are installed once and are silent unless inside `Capture.into(sink, ...)`. The model's parameters stay
frozen; gradients start at the outputs of the lowest captured modules, so the backward pass stops there.

Legend: B examples, T tokens, S contraction length (a multiple of T), m/n output/input features, p/q rows/columns of a
block, K separable terms of the optimizer correction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from trackstar.errors import UnsupportedModel
from trackstar.model import LoadedModel, Member, is_fused_experts
from trackstar.projection import BlockLayout

_EXPERTS_IMPLEMENTATION = "trackstar"


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """The folded projection of one weight matrix.

    `name` is the weight's. `out` [m, K*p] and `in_` [n, K*q] hold the K terms side by side. With `elementwise` [m, n]
    (the exact S of a full second moment, K = 1) the factors are bare projections and S is applied to every per-
    example gradient.
    """

    name: str
    block: int
    terms: int
    out: Tensor
    in_: Tensor
    elementwise: Tensor | None = None


class Sink(Protocol):
    """What becomes of the captured factors of one weight matrix."""

    def add(self, block: int, u_BSp: Tensor, v_BSq: Tensor, *, placed: bool = True) -> None:
        """Take the projected sides; if `placed`, contraction index s belongs to token s * T // S."""

    def add_exact(self, factors: Factors, delta_BSm: Tensor, a_BSn: Tensor, *, placed: bool = True) -> None:
        """Take the unprojected sides of a weight matrix whose correction does not separate."""


class RowSink:
    """Sums u^T v over tokens and weight matrices into rows [B, d] of float32."""

    def __init__(
        self, layout: BlockLayout, *, num_examples: int, num_sites: Mapping[int, int], device: torch.device
    ) -> None:
        self._layout = layout
        self._num_sites = num_sites
        self._pending: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.rows_ND = torch.zeros(num_examples, layout.dim, dtype=torch.float32, device=device)

    def add(self, block: int, u_BSp: Tensor, v_BSq: Tensor, *, placed: bool = True) -> None:
        pending = self._pending.setdefault(block, [])
        pending.append((u_BSp, v_BSq))
        # One contraction per block instead of one per weight matrix: the sum over matrices happens inside the product.
        if len(pending) == self._num_sites[block]:
            self._contract(block)

    def add_exact(self, factors: Factors, delta_BSm: Tensor, a_BSn: Tensor, *, placed: bool = True) -> None:
        assert factors.elementwise is not None
        block_Bd = self._view(factors.block)
        for example, (delta_Sm, a_Sn) in enumerate(zip(delta_BSm, a_BSn, strict=True)):
            corrected_mn = (delta_Sm.mT @ a_Sn) * factors.elementwise
            block_Bd[example] += factors.out.mT @ corrected_mn @ factors.in_

    def finish(self) -> Tensor:
        """Contract what is left and return the rows [B, d]."""
        for block in list(self._pending):
            self._contract(block)
        return self.rows_ND

    def _view(self, block: int) -> Tensor:
        shape = self._layout.blocks[block]
        return self.rows_ND[:, self._layout.span(block)].view(-1, shape.rows, shape.cols)

    def _contract(self, block: int) -> None:
        pending = self._pending.pop(block)
        u_BSp = torch.cat([u for u, _ in pending], dim=1).float()
        v_BSq = torch.cat([v for _, v in pending], dim=1).float()
        self._view(block).add_(torch.bmm(u_BSp.mT, v_BSq))


class TokenSink:
    """Sums u_t Q_b v_t over weight matrices: the exact share of every token and block in <row, query>."""

    def __init__(self, layout: BlockLayout, *, num_examples: int, num_tokens: int, query_d: Tensor) -> None:
        self._queries = [
            part.view(block.rows, block.cols) for part, block in zip(layout.split(query_d), layout.blocks, strict=True)
        ]
        self.contributions_BTb = query_d.new_zeros(num_examples, num_tokens, len(layout.blocks))
        self.unplaced_Bb = query_d.new_zeros(num_examples, len(layout.blocks))

    def add(self, block: int, u_BSp: Tensor, v_BSq: Tensor, *, placed: bool = True) -> None:
        self._place(block, ((u_BSp.float() @ self._queries[block]) * v_BSq.float()).sum(-1), placed)

    def add_exact(self, factors: Factors, delta_BSm: Tensor, a_BSn: Tensor, *, placed: bool = True) -> None:
        assert factors.elementwise is not None
        query_mn = (factors.out @ self._queries[factors.block] @ factors.in_.mT) * factors.elementwise
        self._place(factors.block, ((delta_BSm @ query_mn) * a_BSn).sum(-1), placed)

    def _place(self, block: int, share_BS: Tensor, placed: bool) -> None:
        if placed:
            num_examples, num_tokens, _ = self.contributions_BTb.shape
            self.contributions_BTb[:, :, block] += share_BS.reshape(num_examples, num_tokens, -1).sum(-1)
        else:
            self.unplaced_Bb[:, block] += share_BS.sum(1)


class Capture:
    """Hooks on every contributing module of a model, delivering to one sink at a time."""

    def __init__(self, loaded: LoadedModel, layout: BlockLayout, factors: Mapping[str, Factors]) -> None:
        self.layout = layout
        self._sink: Sink | None = None
        self._shape = (0, 0)
        self._seen: set[str] = set()
        self._handles: list[Any] = []
        self.num_sites: dict[int, int] = dict.fromkeys(range(len(layout.blocks)), 0)
        by_module: dict[str, list[Member]] = {}
        for member in loaded.members:
            by_module.setdefault(member.module_name, []).append(member)
        for module_name, members in by_module.items():
            module = loaded.model.get_submodule(module_name)
            ours = {member.name: factors[member.name] for member in members}
            self._install(module, module_name, members, ours)

    def _install(self, module: nn.Module, module_name: str, members: list[Member], ours: dict[str, Factors]) -> None:
        kind = members[0].kind
        block = ours[members[0].name].block
        if kind in ("linear", "conv1d"):
            self.num_sites[block] += 1
            hook = self._dense_hook(module_name, ours[members[0].name])
            self._handles.append(module.register_forward_hook(hook))
        elif kind == "router":
            self.num_sites[block] += 1
            self._wrap(module, self._router_forward(module, module_name, ours[members[0].name]))
        else:
            assert is_fused_experts(module)
            self.num_sites[block] += len({member.name.rpartition("[")[0] for member in members})
            module.trackstar_capture = _ExpertsCapture(self, module_name, ours)  # type: ignore[assignment]
            self._handles.append(_RestoreExperts(module))
            module.config._experts_implementation = _EXPERTS_IMPLEMENTATION  # type: ignore[union-attr]

    def _wrap(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        original = module.forward
        module.forward = forward
        self._handles.append(_Restore(module, original))

    def remove(self) -> None:
        """Take all hooks out; the model runs as it was loaded."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def into(self, sink: Sink, *, num_examples: int, num_tokens: int) -> Iterator[None]:
        """Deliver everything that is computed inside the block, forward and backward, to `sink`."""
        self._sink, self._shape = sink, (num_examples, num_tokens)
        try:
            yield
        finally:
            self._sink = None

    @contextmanager
    def watching(self) -> Iterator[set[str]]:
        """Collect the names of the modules whose output gradients arrive inside the block."""
        self._seen = set()
        yield self._seen

    @property
    def active(self) -> bool:
        """Whether a sink is listening."""
        return self._sink is not None and torch.is_grad_enabled()

    def observe(self, module_name: str, factors: Factors, a: Tensor, output: Tensor) -> None:
        """Project the inputs `a` now and the gradient of `output` when the backward pass reaches it."""
        sink, (num_examples, num_tokens) = self._sink, self._shape
        assert sink is not None
        a = a.detach()
        placed = a.numel() == num_examples * num_tokens * a.shape[-1]
        if not placed:
            if num_examples > 1:
                raise RoutedTokens(module_name)
            num_tokens = a.numel() // a.shape[-1]
        shape = (num_examples, num_tokens, -1)
        if not output.requires_grad:
            output.requires_grad_(True)
        seen = self._seen
        if factors.elementwise is not None:
            a_BTn = a.reshape(*shape)

            def deliver_exact(delta: Tensor) -> None:
                seen.add(module_name)
                sink.add_exact(factors, delta.reshape(*shape), a_BTn, placed=placed)

            output.register_hook(deliver_exact)
            return
        v_BSq = self._project(a, factors.in_, factors.terms, shape)

        def deliver(delta: Tensor) -> None:
            seen.add(module_name)
            sink.add(factors.block, self._project(delta, factors.out, factors.terms, shape), v_BSq, placed=placed)

        output.register_hook(deliver)

    @staticmethod
    def _project(x: Tensor, factor: Tensor, terms: int, shape: tuple[int, int, int]) -> Tensor:
        num_examples, num_tokens, _ = shape
        return (x.reshape(-1, x.shape[-1]) @ factor).view(num_examples, num_tokens * terms, -1)

    def _dense_hook(self, module_name: str, factors: Factors) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            if self.active:
                self.observe(module_name, factors, arguments[0], output)

        return hook

    def _router_forward(self, module: nn.Module, module_name: str, factors: Factors) -> Callable[..., Any]:
        original = module.forward
        shape = tuple(module.get_parameter("weight").shape)

        def forward(*arguments: Any, **keywords: Any) -> Any:
            if not self.active:
                return original(*arguments, **keywords)
            with _LinearCalls(shape) as calls:
                result = original(*arguments, **keywords)
            if len(calls.found) != 1:
                raise UnsupportedModel(
                    f"{module_name!r} ({type(module).__name__}) holds a weight {shape} but does not apply it as one "
                    f"linear map; leave it out on purpose with --exclude {module_name!r}"
                )
            self.observe(module_name, factors, *calls.found[0])
            return result

        return forward


class RoutedTokens(Exception):
    """A module saw some of the tokens only; which example each belongs to is known only one example at a time."""


class _Restore:
    def __init__(self, module: nn.Module, original: Callable[..., Any]) -> None:
        self._module, self._original = module, original

    def remove(self) -> None:
        self._module.forward = self._original


class _RestoreExperts:
    def __init__(self, module: Any) -> None:
        self._module, self._implementation = module, module.config._experts_implementation

    def remove(self) -> None:
        if self._implementation != _EXPERTS_IMPLEMENTATION:
            self._module.config._experts_implementation = self._implementation


class _LinearCalls(TorchFunctionMode):
    """Records the input and output of every F.linear with a weight of the given shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self._shape = shape
        self.found: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and tuple(args[1].shape) == self._shape:
            if not result.requires_grad:
                result.requires_grad_(True)
            self.found.append((args[0], result))
        return result


class _ExpertsCapture:
    """Receives the two sides of every (token, slot) of one fused experts module, slot-aligned so that tokens stay
    known."""

    def __init__(self, capture: Capture, module_name: str, factors: Mapping[str, Factors]) -> None:
        self._capture = capture
        self._module_name = module_name
        self._factors = factors

    @property
    def active(self) -> bool:
        return self._capture.active

    def linear(
        self, name: str, x_SI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, slots: Sequence[Tensor]
    ) -> Tensor:
        """Apply expert e of `weight_EOI` to the slots `slots[e]`, capturing both sides. Returns [slots, O]."""
        return _expert_linear(x_SI, weight_EOI, bias_EO, slots, self._observer(name) if self.active else None)

    def _observer(self, name: str) -> Callable[[Tensor, Tensor, Sequence[Tensor]], None]:
        capture, factors_by_name, full_name = self._capture, self._factors, f"{self._module_name}.{name}"

        def observe(x_SI: Tensor, y_SO: Tensor, slots: Sequence[Tensor]) -> None:
            sink, (num_examples, _) = capture._sink, capture._shape
            seen = capture._seen
            assert sink is not None
            experts = [factors_by_name[f"{full_name}[{expert}]"] for expert in range(len(slots))]
            first, num_slots = experts[0], x_SI.shape[0]
            x_SI = x_SI.detach()
            if not y_SO.requires_grad:
                y_SO.requires_grad_(True)

            def masked(x_SF: Tensor, index: Tensor) -> Tensor:
                out = torch.zeros_like(x_SF).index_copy_(0, index, x_SF[index])
                return out.view(num_examples, num_slots // num_examples, -1)

            def deliver_exact(delta_SO: Tensor) -> None:
                seen.add(self._module_name)
                for factors, index in zip(experts, slots, strict=True):
                    if len(index):
                        sink.add_exact(factors, masked(delta_SO, index), masked(x_SI, index))

            def project(x_SF: Tensor, sides: Sequence[Tensor]) -> Tensor:
                out = x_SF.new_zeros(num_slots, sides[0].shape[1])
                for side, index in zip(sides, slots, strict=True):
                    if len(index):
                        out[index] = x_SF[index] @ side
                return out.view(num_examples, num_slots // num_examples * first.terms, -1)

            if first.elementwise is not None:
                y_SO.register_hook(deliver_exact)
                return
            v_BSq = project(x_SI, [factors.in_ for factors in experts])

            def deliver(delta_SO: Tensor) -> None:
                seen.add(self._module_name)
                sink.add(first.block, project(delta_SO, [factors.out for factors in experts]), v_BSq)

            y_SO.register_hook(deliver)

        return observe


def _expert_linear(
    x_SI: Tensor,
    weight_EOI: Tensor,
    bias_EO: Tensor | None,
    slots: Sequence[Tensor],
    observe: Callable[[Tensor, Tensor, Sequence[Tensor]], None] | None,
) -> Tensor:
    pieces = [
        nn.functional.linear(x_SI[index], weight_EOI[expert], None if bias_EO is None else bias_EO[expert])
        for expert, index in enumerate(slots)
    ]
    order = torch.argsort(torch.cat(list(slots)))
    y_SO = torch.cat(pieces)[order]
    if observe is not None:
        observe(x_SI, y_SO, slots)
    return y_SO


def _captured_experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts of one layer, expert by expert, with every (token, slot) kept in token order.

    Same mathematics as transformers' own implementations; hidden_states [tokens, hidden], top_k_* [tokens, slots].
    """
    capture: _ExpertsCapture = module.trackstar_capture
    num_tokens, num_slots = top_k_index.shape
    experts = top_k_index.reshape(-1)
    slots = [(experts == expert).nonzero().squeeze(-1) for expert in range(module.down_proj.shape[0])]
    x_SI = hidden_states.repeat_interleave(num_slots, dim=0)

    def apply(name: str, x: Tensor) -> Tensor:
        weight = getattr(module, name)
        bias = getattr(module, f"{name}_bias") if module.has_bias else None
        return capture.linear(name, x, weight.mT if module.is_transposed else weight, bias, slots)

    if module.has_gate:
        inner = module._apply_gate(apply("gate_up_proj", x_SI))
    else:
        inner = module.act_fn(apply("up_proj", x_SI))
    y_SO = apply("down_proj", inner)
    if getattr(module, "has_post_expert_norm", False):
        y_SO = module.post_expert_norm(y_SO)
    weighted = y_SO * top_k_weights.reshape(-1, 1)
    return weighted.view(num_tokens, num_slots, -1).sum(1).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(_EXPERTS_IMPLEMENTATION, _captured_experts_forward)
