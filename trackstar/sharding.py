"""Sharding: one model held by several ranks of a process group, with the same rows as the whole model.

    row = sum over weight matrices and tokens of u^T v          u = delta L'^T,  v = a R'^T

"tensor" cuts every Linear of the decoder layers by its own architecture's tensor-parallel plan. A column shard holds a
slice of output features, thus of delta; a row shard a slice of input features, thus of a. Each rank draws just its
slice of L' or R', and because a row is linear in both, the sum of the ranks' rows is the row: one all-reduce per call.

"fsdp" keeps matrices whole and spreads their storage (FSDP2): a layer is gathered when it runs and dropped after. The
examples of a batch are dealt to the ranks, which make the same number of passes, empty ones included.

Both give every rank the whole result. Embeddings, language-model head and what lies outside the decoder layers stay on
every rank whole. Load on the CPU and give `device`: the host holds the whole checkpoint for a moment, the device its
share and, while an FSDP model is cut or runs, two layers. Gradients never reach parameters, which stay frozen.

Contract: all ranks call with the same arguments in the same order. A rank that lags makes others wait; one that dies
leaves them to the process group's timeout (`services.encoder.gang` ends them earlier).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from trackstar.errors import Incompatible, InvalidRequest, UnsupportedModel
from trackstar.model import LoadedModel, Member, decoder_layers
from trackstar.parallel_linear import ColumnShard, RowShard

Strategy = Literal["tensor", "fsdp"]

_COLUMN = {"colwise": False, "colwise_gather_output": True}
_ROW = {"rowwise": False, "rowwise_split_input": True}
# Its gradient is none of ours, and its forward pass needs nothing.
_NOTHING_TO_DO = "replicated_with_grad_allreduce"

_TRIAL_TOKENS = 16
# Cutting reorders sums; anything wrong shows as an error of order one.
_TRIAL_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
_TRIAL_TOLERANCE_HALF = 0.1


def shard(
    loaded: LoadedModel, *, strategy: Strategy, device: torch.device | str = "cpu", group: ProcessGroup | None = None
) -> LoadedModel:
    """This rank's share of a model; the given one is used up.

    Args:
        loaded: the same checkpoint on every rank, whole, without hooks.
        strategy: "tensor" or "fsdp".
        device: where the share is to be; the group must be able to communicate from there.
        group: the ranks; by default all processes.

    Returns:
        A model for `Encoder`, whose `encode` and `contributions` give every rank everything, and whose plain forward
        pass works when every rank makes it.

    Raises:
        Incompatible: the ranks loaded different checkpoints.
        InvalidRequest: no process group is set up.
        UnsupportedModel: the strategy cannot hold this architecture with the same results; the message says why.
    """
    if not dist.is_initialized():
        raise InvalidRequest("a model is cut over the ranks of a process group; call init_process_group first")
    group = group or dist.group.WORLD
    assert group is not None
    _check_same(loaded, group)
    if strategy == "tensor":
        cut = _tensor_cuts(loaded, group)
    expected = _trial(loaded.model)
    try:
        if strategy == "tensor":
            members = _cut(loaded, cut, group)
            loaded.model.to(device)  # type: ignore[arg-type]
        else:
            members = loaded.members
            _spread(loaded, group, torch.device(device))
        found = _trial(loaded.model)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise _unsupported(loaded, strategy, f"its layers do not run when cut ({error})") from error
    tolerance = _TRIAL_TOLERANCE.get(loaded.model.dtype, _TRIAL_TOLERANCE_HALF)
    for what, before, after in zip(("hidden states", "gradients"), expected, found, strict=True):
        if not float((after - before).norm()) <= tolerance * float(before.norm()):
            raise _unsupported(loaded, strategy, f"its {what} change when it is cut")
    ranks = GroupRanks(group, deals=strategy == "fsdp")
    return replace(loaded, members=members, ranks=ranks)


class GroupRanks:
    """The ranks of a process group; see `trackstar.ranks.Ranks`."""

    def __init__(self, group: ProcessGroup, *, deals: bool) -> None:
        self._group = group
        self._rank = dist.get_rank(group)
        self.num_dealt = dist.get_world_size(group) if deals else 1

    def mine(self, batch: Sequence[int]) -> list[int]:
        """Every `num_dealt`-th example of the batch."""
        return list(batch[self._rank :: self.num_dealt]) if self.num_dealt > 1 else list(batch)

    def sum_(self, part: Tensor) -> None:
        """All-reduce in place."""
        if part.numel():
            dist.all_reduce(part, group=self._group)


def _unsupported(loaded: LoadedModel, strategy: Strategy, why: str) -> UnsupportedModel:
    instead = "use the strategy 'fsdp'" if strategy == "tensor" else "serve it whole, without sharding"
    return UnsupportedModel(f"{type(loaded.model).__name__} cannot be cut by {strategy!r}: {why}; {instead}")


def _check_same(loaded: LoadedModel, group: ProcessGroup) -> None:
    digests: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(digests, loaded.digest, group=group)
    for rank, digest in enumerate(digests):
        if digest != digests[0]:
            raise Incompatible(
                f"rank {rank} loaded checkpoint {str(digest)[:12]}, rank 0 checkpoint {str(digests[0])[:12]}; "
                "give all ranks the same"
            )


def _tensor_cuts(loaded: LoadedModel, group: ProcessGroup) -> dict[str, str]:
    """Style by name of every Linear of the decoder layers; raises unless all of them can be cut."""
    model: Any = loaded.model
    world = dist.get_world_size(group)
    layers_name, _ = decoder_layers(model)
    plan = {name: style for name, style in (model.tp_plan or {}).items() if name.startswith(f"{layers_name}.")}
    if not plan:
        raise _unsupported(loaded, "tensor", "the architecture brings no tensor-parallel plan")
    for name, style in plan.items():
        if style not in _COLUMN and style not in _ROW and style != _NOTHING_TO_DO:
            raise _unsupported(loaded, "tensor", f"its plan has {name!r} as {style!r}")
    for member in loaded.members:
        if member.kind != "linear":
            raise _unsupported(loaded, "tensor", f"{member.module_name!r} is no plain Linear but of kind {member.kind}")
    styles: dict[str, str] = {}
    for name, module in model.get_submodule(layers_name).named_modules(prefix=layers_name):
        if not isinstance(module, nn.Linear):
            continue
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name), _NOTHING_TO_DO)
        if style == _NOTHING_TO_DO:
            raise _unsupported(loaded, "tensor", f"its plan leaves out {name!r}")
        features = module.out_features if style in _COLUMN else module.in_features
        if features % world:
            raise _unsupported(loaded, "tensor", f"{features} features of {name!r} do not divide by {world} ranks")
        styles[name] = style
    text_config = model.config.get_text_config()
    if any(style == "colwise" for style in styles.values()):
        for name in ("num_attention_heads", "num_key_value_heads"):
            if (heads := getattr(text_config, name, None) or 0) % world:
                raise _unsupported(loaded, "tensor", f"{name} = {heads} does not divide by {world} ranks")
    return styles


def _cut(loaded: LoadedModel, styles: dict[str, str], group: ProcessGroup) -> tuple[Member, ...]:
    """Put shards in the place of the Linear modules; the members then name what is inside them."""
    by_module = {member.module_name: member for member in loaded.members}
    cut: dict[str, Member] = {}
    for name, style in styles.items():
        linear = loaded.model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        held_out, held_in = range(linear.out_features), range(linear.in_features)
        held: ColumnShard | RowShard
        if style in _COLUMN:
            held_out = _own(held_out, group)
            held = ColumnShard(linear, held_out, group, gather_output=_COLUMN[style])
        else:
            held_in = _own(held_in, group)
            held = RowShard(linear, held_in, group, split_input=_ROW[style])
        loaded.model.set_submodule(name, held)
        if name in by_module:
            cut[name] = replace(by_module[name], module_name=f"{name}.local", cut=(held_out, held_in))
    return tuple(cut[member.module_name] for member in loaded.members)


def _own(features: range, group: ProcessGroup) -> range:
    size = len(features) // dist.get_world_size(group)
    start = dist.get_rank(group) * size
    return range(start, start + size)


def _spread(loaded: LoadedModel, group: ProcessGroup, device: torch.device) -> None:
    """FSDP2 on every decoder layer; the base is the root, so that the next layer is gathered while one runs."""
    model = loaded.model
    layers = model.get_submodule(decoder_layers(model)[0])
    spread = set(layers.parameters())
    outside = {parameter for parameter in model.parameters() if parameter not in spread}
    for tensor in (*outside, *model.buffers()):
        tensor.data = tensor.data.to(device)
    mesh = DeviceMesh.from_group(group, device.type)
    for layer in layers.children():
        fully_shard(layer, mesh=mesh)
    fully_shard(loaded.base, mesh=mesh, ignored_params=outside)


def _trial(model: Any) -> tuple[Tensor, Tensor]:
    """Hidden states of a few tokens and the gradient of a random direction of theirs to the embeddings, float64."""
    base = model.base_model
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.config.get_text_config().vocab_size)
    tokens_BT = torch.randint(vocabulary, (1, _TRIAL_TOKENS), generator=generator).to(model.device)
    embedded_BTH = base.get_input_embeddings()(tokens_BT).detach().requires_grad_(True)
    hidden_BTH = base(inputs_embeds=embedded_BTH, use_cache=False).last_hidden_state
    direction_BTH = torch.randn(hidden_BTH.shape, generator=generator).to(hidden_BTH.device, hidden_BTH.dtype)
    # `backward` and not `autograd.grad`: FSDP finishes a pass in a callback of the former.
    hidden_BTH.backward(direction_BTH)
    assert embedded_BTH.grad is not None
    return hidden_BTH.detach().cpu().double(), embedded_BTH.grad.cpu().double()
