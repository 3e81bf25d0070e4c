"""Linear layers of which every rank of a process group holds a slice, and the collectives around them.

    column shard   y_r = x W_r^T        W cut by output features; x is whole on every rank, y_r is this rank's slice
    row shard      y   = sum_r x_r W_r^T  W cut by input features; x_r is this rank's slice, y is whole

The slice itself is a plain Linear, `local`: hooks on it see inputs, outputs and output gradients of exactly the slice,
since all communication happens outside of it. Forward passes run in the caller's autograd mode; weights stay frozen.
The order of collectives follows the order of modules and is the same on every rank.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup


class ColumnShard(nn.Module):
    """Output features `held` of a Linear; with `gather_output` all ranks' slices are joined afterwards."""

    def __init__(self, linear: nn.Linear, held: range, group: ProcessGroup, *, gather_output: bool) -> None:
        super().__init__()
        rows = slice(held.start, held.stop)
        bias = _bias(linear)
        self.local = _linear(linear.weight[rows], None if bias is None else bias[rows])
        self._group = group
        self._gather_output = gather_output

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., held] or [..., out]."""
        y: Tensor = self.local(_call(_Shared, x, self._group))
        return _call(_Joined, y, self._group) if self._gather_output else y


class RowShard(nn.Module):
    """Input features `held` of a Linear, summed over ranks; with `split_input` the input comes whole."""

    def __init__(self, linear: nn.Linear, held: range, group: ProcessGroup, *, split_input: bool) -> None:
        super().__init__()
        self.local = _linear(linear.weight[:, held.start : held.stop], None)
        self.bias = _bias(linear)
        self._group = group
        self._split_input = split_input

    def forward(self, x: Tensor) -> Tensor:
        """[..., held] or [..., in] to [..., out]."""
        if self._split_input:
            x = _call(_Split, x, self._group)
        y = _call(_Summed, self.local(x), self._group)
        return y if self.bias is None else y + self.bias


def _bias(linear: nn.Linear) -> nn.Parameter | None:
    # Annotated as if there always were one.
    bias: nn.Parameter | None = linear.bias
    return bias


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    # A copy, so that the whole matrix can be let go.
    linear.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return linear


def _call(function: type[torch.autograd.Function], x: Tensor, group: ProcessGroup) -> Tensor:
    return cast(Tensor, function.apply(x, group))


def _slice(x: Tensor, group: ProcessGroup) -> Tensor:
    return x.chunk(dist.get_world_size(group), dim=-1)[dist.get_rank(group)].contiguous()


def _join(x: Tensor, group: ProcessGroup) -> Tensor:
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x, group=group)
    return torch.cat(parts, dim=-1)


def _sum(x: Tensor, group: ProcessGroup) -> Tensor:
    # A copy: hooks hold on to what they were given.
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


class _Shared(torch.autograd.Function):
    """Whole on every rank; each rank's use of it adds to its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _sum(gradients[0], ctx.group), None


class _Summed(torch.autograd.Function):
    """Sum over ranks; what follows is the same on every rank, so the gradient is too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Joined(torch.autograd.Function):
    """All ranks' slices of the last dimension side by side."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _join(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _slice(gradients[0], ctx.group), None


class _Split(torch.autograd.Function):
    """This rank's slice of the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _slice(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _join(gradients[0], ctx.group), None
