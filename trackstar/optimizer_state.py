"""Second moments out of a torch optimizer state, by parameter name and oriented [out_features, in_features].

Contract: `read_optimizer` opens the `optimizer.pt` of a Hugging Face Trainer checkpoint with the restricted unpickler
(tensors and plain values only, memory-mapped), finds out which optimizer wrote it, maps its numbered entries to the
model's parameters, checks every shape, and returns what the optimizer itself would divide by:

- Adam and AdamW (torch): `exp_avg_sq` / (1 - beta2^step), with AMSGrad the running maximum; S = 1 / (sqrt(V) + eps);
- Adafactor of transformers: `exp_avg_sq_row`, `exp_avg_sq_col`; its eps is already inside them;
- Adafactor of torch: `row_var`, `col_var`; its eps1 is a floor of sqrt(V). Its further floor of eps1 under mean(row)
  multiplies a whole matrix by a constant that its update clipping takes away again; the paper's form is kept here.

The state numbers its parameters in the order of the parameter groups and (without `param_names`) does not say which
they are. The Trainer puts parameters with weight decay first; which those are changed between its versions, so the
known groupings are tried in turn and the first whose group sizes and shapes all fit is taken. Tied weights appear once.

`read_adam_moments` gives both of Adam's moments as they are stored, and `read_adafactor_moments` those of transformers'
Adafactor, to continue training from.

It does not read sharded states (DeepSpeed, FSDP shards), 8-bit states, or gradients.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.trainer_pt_utils import get_parameter_names

from trackstar.errors import CorruptArtifact, Incompatible, InvalidRequest, NotFound

# What goes without weight decay, as module types and name patterns: in Trainer.get_decay_parameter_names of
# transformers 5, in that of 4.x, and in the loops of its older examples.
_NO_DECAY: tuple[tuple[list[type[nn.Module]], list[str]], ...] = (
    ([nn.LayerNorm], [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]),
    ([nn.LayerNorm], [r"bias"]),
    ([], [r"bias"]),
)
# Keys that only one kind of state has, and the entry whose shape is that of the parameter.
_FULL_KEYS = ("max_exp_avg_sq", "exp_avg_sq")
_FACTORED_KEYS = (("exp_avg_sq_row", "exp_avg_sq_col"), ("row_var", "col_var"))


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerMoments:
    """Second moments by parameter name: [..., m, n] full, [..., m] and [..., n] factored; experts lead."""

    kind: Literal["adam", "adafactor"]
    eps: float
    full: dict[str, Tensor]
    factored: dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamMoments:
    """Both moments of one parameter after `step` steps, not corrected for their start, in the parameter's own shape."""

    first: Tensor
    second: Tensor
    step: float
    betas: tuple[float, float]
    eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AdafactorMoments:
    """Second moment of one parameter after `step` steps: averages over its rows and columns, or whole if it has one
    dimension. Step t forgets t^`decay` of it; `eps` is added to squared gradients, and updates are cut to a root mean
    square of `clip`."""

    row: Tensor | None
    col: Tensor | None
    whole: Tensor | None
    step: float
    decay: float
    eps: float
    clip: float


def transposed_parameters(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that are stored [..., in_features, out_features]: Conv1D, and some fused experts."""
    return frozenset(
        f"{module_name}.{name}" if module_name else name
        for module_name, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if (isinstance(module, Conv1D) and parameter.ndim == 2)
        or (getattr(module, "is_transposed", False) is True and parameter.ndim == 3)
    )


def find_optimizer(path: Path) -> Path:
    """The optimizer state in a checkpoint folder, or `path` itself when it is a file.

    Raises:
        NotFound: there is none; the message names checkpoints below the folder if there are any.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise NotFound(
            f"there is no optimizer state {str(path)!r}; give a Trainer checkpoint folder or its optimizer.pt"
        )
    for name in ("optimizer.pt", "optimizer.bin"):
        if (path / name).is_file():
            return path / name
    checkpoints = sorted(folder.parent.name for folder in path.glob("*/optimizer.pt"))
    advice = (
        f"give one of {', '.join(checkpoints)} in it"
        if checkpoints
        else "keep it when training, or estimate the moments"
    )
    raise NotFound(f"{str(path)!r} holds no optimizer.pt; {advice}")


def read_optimizer(path: Path, model: nn.Module, wanted: Collection[str] | None = None) -> OptimizerMoments:
    """Second moments of the model's weights with two or more dimensions, from a checkpoint folder or optimizer.pt.

    Args:
        path: the folder or file.
        model: the model the state should belong to; only names and shapes are looked at.
        wanted: parameter names to keep; all when None. Shapes are checked for every parameter all the same.

    Raises:
        NotFound: no optimizer state there.
        CorruptArtifact: it cannot be unpickled without running code, or is no optimizer state.
        Incompatible: it does not belong to this model; names the parameter and both shapes.
        InvalidRequest: it belongs to an optimizer that keeps no second moments this module can read.
    """
    path = find_optimizer(path)
    groups, states = _open(path)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    names = _parameter_names(groups, states, model, shapes)
    transposed = transposed_parameters(model)
    present = {key for state in states.values() for key in state}
    factored_keys = next((keys for keys in _FACTORED_KEYS if set(keys) <= present), None)
    if factored_keys is None and not present & set(_FULL_KEYS):
        raise InvalidRequest(
            f"the optimizer state {str(path)!r} holds no second moments that can be read (its entries are "
            f"{', '.join(sorted(present)) or 'none'}); estimate the moments from the corpus instead"
        )
    full: dict[str, Tensor] = {}
    factored: dict[str, tuple[Tensor, Tensor]] = {}
    for index, (name, group) in names.items():
        shape = shapes[name]
        if len(shape) < 2 or (wanted is not None and name not in wanted):
            continue
        state = states.get(index, {})
        if factored_keys is not None:
            row, col = _factors(state, shape, factored_keys)
            factored[name] = (col, row) if name in transposed else (row, col)
        else:
            moment = _adam(state, group, shape, path)
            full[name] = moment.mT if name in transposed else moment
    return OptimizerMoments(
        kind="adam" if factored_keys is None else "adafactor",
        eps=_eps(groups, states, factored_keys),
        full=full,
        factored=factored,
    )


def read_adam_moments(path: Path, model: nn.Module) -> dict[str, AdamMoments]:
    """Adam's moments by parameter name; parameters that never received a gradient are left out.

    Args:
        path: the checkpoint folder or optimizer.pt; large tensors stay on disk, memory-mapped.
        model: the model the state should belong to; only names and shapes are looked at.

    Raises:
        NotFound, CorruptArtifact, Incompatible: as `read_optimizer`.
        InvalidRequest: another optimizer than Adam or AdamW wrote it, or one with AMSGrad.
    """
    path = find_optimizer(path)
    groups, states = _open(path)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found: dict[str, AdamMoments] = {}
    for index, (name, group) in _parameter_names(groups, states, model, shapes).items():
        state = states.get(index)
        if not state:
            continue
        if "max_exp_avg_sq" in state or not {"exp_avg", "exp_avg_sq"} <= state.keys():
            raise InvalidRequest(
                f"the optimizer state {str(path)!r} is not that of Adam or AdamW without AMSGrad, so it cannot be "
                "carried on; take a step from a fresh state instead"
            )
        step = state.get("step", group.get("step"))
        if step is None or "betas" not in group:
            raise _lacks_step(path)
        beta1, beta2 = group["betas"]
        found[name] = AdamMoments(
            first=state["exp_avg"],
            second=state["exp_avg_sq"],
            step=float(step),
            betas=(float(beta1), float(beta2)),
            eps=float(group.get("eps", 1e-8)),
        )
    return found


def read_adafactor_moments(path: Path, model: nn.Module) -> dict[str, AdafactorMoments]:
    """Adafactor's moments by parameter name, in the parameter's own shape; those without a gradient are left out.

    Args:
        path: as of `read_adam_moments`.
        model: as of `read_adam_moments`.

    Raises:
        NotFound, CorruptArtifact, Incompatible: as `read_optimizer`.
        InvalidRequest: another optimizer than transformers' Adafactor wrote it.
    """
    path = find_optimizer(path)
    groups, states = _open(path)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found: dict[str, AdafactorMoments] = {}
    for index, (name, group) in _parameter_names(groups, states, model, shapes).items():
        state = states.get(index)
        if not state:
            continue
        row, col, whole = (state.get(key) for key in (*_FACTORED_KEYS[0], "exp_avg_sq"))
        if (row is None or col is None) == (whole is None) or "clip_threshold" not in group:
            raise InvalidRequest(
                f"the optimizer state {str(path)!r} is not that of transformers' Adafactor, so it cannot be carried "
                "on; take a step from a fresh state instead"
            )
        if "step" not in state or "decay_rate" not in group:
            raise _lacks_step(path)
        found[name] = AdafactorMoments(
            row=row,
            col=col,
            whole=whole,
            step=float(state["step"]),
            decay=float(group["decay_rate"]),
            eps=float(group["eps"][0]),
            clip=float(group["clip_threshold"]),
        )
    return found


def _open(path: Path) -> tuple[list[dict[str, Any]], dict[Any, dict[str, Any]]]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        raise CorruptArtifact(
            f"the optimizer state {str(path)!r} cannot be read as plain tensors: it is truncated, was altered, "
            "or holds objects that would run code"
        ) from error
    try:
        groups = [{**group, "params": list(group["params"])} for group in content["param_groups"]]
        states = {index: dict(state) for index, state in content["state"].items()}
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise CorruptArtifact(
            f"{str(path)!r} is not the state of a torch optimizer: it has no 'param_groups' and 'state'"
        ) from error
    return groups, states


def _parameter_names(
    groups: list[dict[str, Any]],
    states: dict[Any, dict[str, Any]],
    model: nn.Module,
    shapes: dict[str, tuple[int, ...]],
) -> dict[Any, tuple[str, dict[str, Any]]]:
    """Index in the state -> (parameter name, its group); every shape checked."""
    entries = [(index, group) for group in groups for index in group["params"]]
    stored = {index: _stored_shape(states.get(index, {})) for index, _ in entries}
    if all("param_names" in group for group in groups):
        groupings = [[[_plain(name) for name in group["param_names"]] for group in groups]]
    elif all(isinstance(index, str) for index, _ in entries):
        groupings = [[[_plain(index) for index in group["params"]] for group in groups]]
    else:
        groupings = list(_groupings(model, shapes))
    sizes = [len(group["params"]) for group in groups if group["params"]]
    complaint: str | None = None
    for grouping in groupings:
        names = [name for group_names in grouping for name in group_names]
        if [len(group_names) for group_names in grouping if group_names] != sizes:
            continue
        mismatch = _mismatch([index for index, _ in entries], names, stored, shapes)
        if mismatch is None:
            return {index: (name, group) for (index, group), name in zip(entries, names, strict=True)}
        complaint = complaint or mismatch
    if complaint is None:
        names = [name for group_names in groupings[0] for name in group_names]
        complaint = f"it holds {len(entries)} parameters in groups of {sizes} and the model has {len(shapes)}"
        if first := _mismatch([index for index, _ in entries], names, stored, shapes):
            complaint += f"; {first}"
    raise Incompatible(
        f"the optimizer state does not belong to this model: {complaint}; give the state of the same checkpoint, "
        "trained with all parameters"
    )


def _groupings(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> Iterator[list[list[str]]]:
    """The ways in which trainers order parameters, likeliest first."""
    for types, patterns in _NO_DECAY:
        decay = set(get_parameter_names(model, types, patterns))
        yield [[name for name in shapes if name in decay], [name for name in shapes if name not in decay]]
    # RMSNorm classes counted as LayerNorms in 4.x; vectors without decay is also the habit of hand-written loops.
    yield [
        [name for name, shape in shapes.items() if len(shape) >= 2],
        [n for n, shape in shapes.items() if len(shape) < 2],
    ]
    yield [list(shapes)]


def _plain(name: str) -> str:
    """The name without what wrappers put in front (DistributedDataParallel, torch.compile)."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def _stored_shape(state: dict[str, Any]) -> tuple[int, ...] | None:
    """The parameter's shape as the state tells it; None when the parameter never received a gradient."""
    for row_key, col_key in _FACTORED_KEYS:
        if row_key in state and col_key in state:
            row, col = state[row_key], state[col_key]
            if row_key == "row_var":
                row, col = row.squeeze(-1), col.squeeze(-2)
            return (*row.shape, col.shape[-1])
    moment = next((state[key] for key in (*_FULL_KEYS, "variance") if isinstance(state.get(key), Tensor)), None)
    return None if moment is None else tuple(moment.shape)


def _mismatch(
    indices: list[Any], names: list[str], stored: dict[Any, tuple[int, ...] | None], shapes: dict[str, tuple[int, ...]]
) -> str | None:
    for index, name in zip(indices, names, strict=False):
        if name not in shapes:
            return f"the model has no parameter {name!r}"
        found = stored[index]
        if found is not None and found != shapes[name]:
            return f"{name!r} has shape {shapes[name]} in the model and {found} in the optimizer state"
    return None


def _adam(state: dict[str, Any], group: dict[str, Any], shape: tuple[int, ...], path: Path) -> Tensor:
    """Bias-corrected second moment; zeros for a parameter that never received a gradient."""
    moment: Tensor | None = next((state[key] for key in _FULL_KEYS if key in state), None)
    if moment is None:
        return torch.zeros(shape)
    step = state.get("step", group.get("step"))
    if step is None or "betas" not in group:
        raise _lacks_step(path)
    correction = 1.0 - float(group["betas"][1]) ** float(step)
    # After tens of thousands of steps there is nothing to correct, and the memory map needs no copy.
    return moment.float() if correction in (0.0, 1.0) else (moment.double() / correction).float()


def _lacks_step(path: Path) -> CorruptArtifact:
    return CorruptArtifact(
        f"the optimizer state {str(path)!r} lacks the step count or decay of its moments, so it cannot be corrected"
    )


def _factors(state: dict[str, Any], shape: tuple[int, ...], keys: tuple[str, str]) -> tuple[Tensor, Tensor]:
    if keys[0] not in state:
        return torch.zeros(shape[:-1]), torch.zeros(shape[:-2] + shape[-1:])
    row, col = state[keys[0]].float(), state[keys[1]].float()
    return (row.squeeze(-1), col.squeeze(-2)) if keys[0] == "row_var" else (row, col)


def _eps(
    groups: list[dict[str, Any]], states: dict[Any, dict[str, Any]], factored_keys: tuple[str, str] | None
) -> float:
    eps = groups[0].get("eps")
    if factored_keys is None:
        return float(eps) if isinstance(eps, (int, float, Tensor)) else 1e-8
    if factored_keys[0] == "exp_avg_sq_row":
        return 0.0
    if isinstance(eps, (tuple, list)) and eps[0] is not None:
        return float(eps[0])
    dtype = next(state["row_var"].dtype for state in states.values() if "row_var" in state)
    return float(torch.finfo(dtype).eps)
