"""Second moments V of the gradients: where the optimizer correction comes from.

The correction divides every gradient elementwise by sqrt(V), on the passages' and the queries' side alike. V is kept as
the optimizer keeps it, factored (row and column means) or full, or estimated from squared per-example gradients of a
corpus sample, or absent. `Moments.scale` gives the separable form that folds into the projections (`separable`), and
`Moments.exact` the elementwise one for the exact per-example path.

Contract: names are the model's `named_parameters()` names, with `[e]` behind the name of a fused expert weight; all
matrices are [out_features, in_features] = [m, n], whatever way the model stores them. `row` is the mean of V over the
columns, [m], `col` its mean over the rows, [n]. The digest is over names, values and eps, so it tells moments apart and
survives saving. A weight whose V is silent throughout (an expert no token ever reached) is scaled as the model's
average weight; single silent rows and columns are treated in `separable`.

Files are safetensors: `NAME` full, or `NAME.row` with `NAME.col`. In a file of one's own making the tensors lie as the
model stores the parameter; what `save_moments` writes is already oriented and says so in its metadata.

It does not run the model: whoever captures activations and output gradients feeds them to `MomentEstimator`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trackstar.errors import CorruptArtifact, Incompatible, InvalidRequest, NotFound
from trackstar.optimizer_state import read_optimizer, transposed_parameters
from trackstar.separable import (
    SILENT_FRACTION,
    SeparableScale,
    adafactor_scale,
    exact_scale,
    fit_separable,
    relative_error,
    uniform_scale,
)
from trackstar.storage import publish

__all__ = [
    "FactoredMoment",
    "MomentEstimator",
    "MomentKind",
    "Moments",
    "SeparableScale",
    "load_moments",
    "save_moments",
    "squared_gradient_sums",
]

MomentKind = Literal["none", "adafactor", "adam", "file", "estimate"]

FORMAT = "trackstar.moments.1"
DEFAULT_EPS = 1e-8  # Adam's, for files that do not say
GRAM_ELEMENTS = 1 << 24  # of token-by-token Gram matrices held at once by the estimator


@dataclass(frozen=True, slots=True, kw_only=True)
class FactoredMoment:
    """V_ij = row_i col_j / mean(row)."""

    row: Tensor  # float32 [m], mean over columns
    col: Tensor  # float32 [n], mean over rows
    error: float = 0.0  # expected relative squared error against the full V it was reduced from; 0.0 if it never was


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Second moments of a model's weights; each weight is in `factored` or in `full`."""

    kind: MomentKind
    digest: str  # hexadecimal SHA-256 of the contents
    source: str  # where they come from, for people
    factored: dict[str, FactoredMoment]
    full: dict[str, Tensor]  # float32 [m, n]
    eps: float  # added to sqrt(V) where V is full, a floor of sqrt(V) where it is factored
    average: float  # mean of V over each weight, averaged over the weights

    def scale(self, name: str, shape: tuple[int, int], rank: int) -> SeparableScale:
        """V^(-1/2) of one weight as a sum of outer products; all ones without moments.

        A full V is fitted with `rank` terms; a factored one is one term, whatever the rank.

        Raises:
            Incompatible: the moments do not hold this weight in this shape.
        """
        if self.kind == "none":
            return uniform_scale(*shape, 1.0)
        moment = self._moment(name, shape)
        if _mean(moment) <= SILENT_FRACTION * self.average:
            return uniform_scale(*shape, 1.0 / (self.average**0.5 + self.eps))
        if isinstance(moment, Tensor):
            return fit_separable(moment, self.eps, rank)
        scale = adafactor_scale(moment.row, moment.col, self.eps)
        return SeparableScale(out=scale.out, in_=scale.in_, error=moment.error)

    def exact(self, name: str, shape: tuple[int, int]) -> Tensor:
        """V^(-1/2) of one weight element by element, float32 [m, n]; raises as `scale` does."""
        moment = None if self.kind == "none" else self._moment(name, shape)
        if isinstance(moment, Tensor) and _mean(moment) > SILENT_FRACTION * self.average:
            return exact_scale(moment, self.eps)
        return self.scale(name, shape, rank=1).dense()

    def _moment(self, name: str, shape: tuple[int, int]) -> FactoredMoment | Tensor:
        moment = self.full.get(name, self.factored.get(name))
        if moment is None:
            raise Incompatible(f"the moments from {self.source} hold no weight {name!r}; they belong to another model")
        found = tuple(moment.shape) if isinstance(moment, Tensor) else (len(moment.row), len(moment.col))
        if found != tuple(shape):
            raise Incompatible(
                f"the moments from {self.source} do not belong to this model: {name!r} has shape {tuple(shape)} in the "
                f"model and {found} in the moments"
            )
        return moment


def load_moments(spec: str | Path, model: nn.Module, *, names: Collection[str] | None = None) -> Moments:
    """Read the second moments that `spec` names and check them against the model.

    Args:
        spec: "none", a Hugging Face Trainer checkpoint folder, its optimizer.pt, or a .safetensors file.
        model: the model they should belong to; names, shapes and storage order are looked at, values never.
        names: the weights that will be asked for (expert indices in brackets are allowed); every weight when None.
            Less is read and kept with names.

    Raises:
        NotFound: there is no such file or folder.
        CorruptArtifact: it cannot be read, or holds negative or non-finite second moments.
        Incompatible: it does not belong to this model, or records no gradient at all.
        InvalidRequest: it holds no second moments that can be read, or `spec` is "estimate".
    """
    if spec == "none":
        return _moments("none", "nothing", {}, {}, 0.0)
    if spec == "estimate":
        raise InvalidRequest("estimated moments are made from a corpus sample; save them and give that file here")
    path = Path(spec)
    wanted = None if names is None else {name.partition("[")[0] for name in names}
    if path.suffix == ".safetensors":
        return _load_file(path, model, wanted)
    state = read_optimizer(path, model, wanted)
    return _moments(state.kind, repr(str(path)), *_by_matrix(state.factored, state.full, state.eps), state.eps)


def save_moments(moments: Moments, path: Path) -> None:
    """Write moments to a safetensors file that `load_moments` reads back unchanged; raises StorageFull."""
    tensors = {name: tensor.contiguous() for name, tensor in moments.full.items()}
    for name, moment in moments.factored.items():
        tensors[f"{name}.row"], tensors[f"{name}.col"] = moment.row.contiguous(), moment.col.contiguous()
    about = {
        "kind": moments.kind,
        "source": moments.source,
        "eps": moments.eps,
        "digest": moments.digest,
        "errors": {name: moment.error for name, moment in moments.factored.items() if moment.error},
    }
    publish(path, safetensors.torch.save(tensors, {"format": FORMAT, "moments": json.dumps(about, sort_keys=True)}))


def squared_gradient_sums(delta_BTm: Tensor, a_BTn: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column sums of G^2 for every example's weight gradient G = delta^T a, without forming G.

    sum_j G_ij^2 = (delta^T (a a^T) delta)_ii, and the same with the sides exchanged for the columns.

    Args:
        delta_BTm: gradients of the loss with respect to the layer's outputs; zero at padding.
        a_BTn: the layer's inputs.

    Returns:
        float64 [B, m] and [B, n]. The products run in the inputs' precision, at least float32.
    """
    if delta_BTm.dtype.itemsize < 4:
        delta_BTm, a_BTn = delta_BTm.float(), a_BTn.float()
    step = max(1, GRAM_ELEMENTS // delta_BTm.shape[1] ** 2)
    rows, columns = [], []
    for delta, a in zip(torch.split(delta_BTm, step), torch.split(a_BTn, step), strict=True):
        # A quadratic form of a Gram matrix cannot be negative; its rounding can.
        rows.append(((a @ a.mT) @ delta).mul_(delta).sum(dim=1, dtype=torch.float64).clamp_min_(0.0))
        columns.append(((delta @ delta.mT) @ a).mul_(a).sum(dim=1, dtype=torch.float64).clamp_min_(0.0))
    return torch.cat(rows), torch.cat(columns)


class MomentEstimator:
    """Factored second moments from squared per-example gradients of a corpus sample, accumulated in float64."""

    def __init__(self, source: str = "a sample of the corpus") -> None:
        self._source = source
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, name: str, delta_BTm: Tensor, a_BTn: Tensor) -> None:
        """Add a batch of examples for one weight; an example that does not reach the weight may be left out."""
        row, col = (side.sum(dim=0).cpu() for side in squared_gradient_sums(delta_BTm, a_BTn))
        if name in self._sums:
            row, col = row + self._sums[name][0], col + self._sums[name][1]
        self._sums[name] = (row, col)

    def finish(self, num_examples: int) -> Moments:
        """The mean over `num_examples` examples; raises InvalidRequest when there is nothing to average."""
        if num_examples < 1 or not self._sums:
            raise InvalidRequest("moments cannot be estimated from an empty sample; give a corpus with more passages")
        factored = {
            name: FactoredMoment(
                row=(row / (num_examples * len(col))).float(), col=(col / (num_examples * len(row))).float()
            )
            for name, (row, col) in self._sums.items()
        }
        return _moments("estimate", self._source, factored, {}, 0.0)


def _mean(moment: FactoredMoment | Tensor) -> float:
    return float((moment if isinstance(moment, Tensor) else moment.row).mean(dtype=torch.float64))


def _moments(
    kind: MomentKind, source: str, factored: dict[str, FactoredMoment], full: dict[str, Tensor], eps: float
) -> Moments:
    """Check the values, average and digest them."""
    digest = hashlib.sha256(json.dumps([FORMAT, kind == "none", eps]).encode())
    means = []
    moments: dict[str, FactoredMoment | Tensor] = {**full, **factored}
    for name, moment in sorted(moments.items()):
        sides = [moment] if isinstance(moment, Tensor) else [moment.row, moment.col]
        digest.update(json.dumps([name, [list(side.shape) for side in sides]]).encode())
        for side in sides:
            if not (float(side.min()) >= 0.0 and float(side.max()) < float("inf")):
                raise CorruptArtifact(f"the moments from {source} hold negative or non-finite values for {name!r}")
            digest.update(side.contiguous().numpy().data)
        means.append(_mean(moment))
    if kind != "none" and not any(means):
        raise Incompatible(f"the moments from {source} record no gradient at all; give those of a trained checkpoint")
    average = sum(means) / len(means) if means else 0.0
    return Moments(
        kind=kind, digest=digest.hexdigest(), source=source, factored=factored, full=full, eps=eps, average=average
    )


def _by_matrix(
    factored: Mapping[str, tuple[Tensor, Tensor]], full: Mapping[str, Tensor], eps: float
) -> tuple[dict[str, FactoredMoment], dict[str, Tensor]]:
    """Take fused experts apart; their full V is reduced to the factored form, with its error."""
    matrices: dict[str, FactoredMoment] = {}
    for name, (row, col) in factored.items():
        if row.ndim == 1:
            matrices[name] = FactoredMoment(row=row, col=col)
        for expert in range(len(row) if row.ndim == 2 else 0):
            matrices[f"{name}[{expert}]"] = FactoredMoment(row=row[expert], col=col[expert])
    for name, stack in full.items():
        for expert, v in enumerate(stack if stack.ndim == 3 else ()):
            row, col = v.mean(dim=1, dtype=torch.float64).float(), v.mean(dim=0, dtype=torch.float64).float()
            error = relative_error(v, eps, adafactor_scale(row, col, eps))
            matrices[f"{name}[{expert}]"] = FactoredMoment(row=row, col=col, error=error)
    return matrices, {name: tensor for name, tensor in full.items() if tensor.ndim == 2}


def _load_file(path: Path, model: nn.Module, wanted: Collection[str] | None) -> Moments:
    if not path.is_file():
        raise NotFound(f"there is no moments file {str(path)!r}")
    about: dict[str, Any] = {
        "kind": "file",
        "source": repr(str(path)),
        "eps": DEFAULT_EPS,
        "errors": {},
        "digest": None,
    }
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            held = {key: file.get_tensor(key) for key in file.keys() if _is_wanted(key, wanted)}  # noqa: SIM118 - not a dict
            saved_here = metadata.get("format") == FORMAT
            if saved_here:
                about |= json.loads(metadata["moments"])
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise CorruptArtifact(f"the moments file {str(path)!r} is truncated or was altered; write it again") from error
    factored, full = _checked(path, held, model, oriented=saved_here)
    matrices, kept = _by_matrix(factored, full, about["eps"])
    if saved_here:
        matrices = {name: replace(moment, error=about["errors"].get(name, 0.0)) for name, moment in matrices.items()}
    moments = _moments(about["kind"], about["source"], matrices, kept, about["eps"])
    if saved_here and wanted is None and moments.digest != about["digest"]:
        raise CorruptArtifact(f"the moments file {str(path)!r} was altered: its contents do not match its digest")
    return moments


def _checked(
    path: Path, held: dict[str, Tensor], model: nn.Module, *, oriented: bool
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Factored and full tensors of the file as [..., m, n], every shape compared with the model's."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    transposed = transposed_parameters(model)
    sides: dict[str, dict[str, Tensor]] = {}
    full: dict[str, Tensor] = {}
    for key, tensor in held.items():
        name, form = (key[:-4], key[-3:]) if key not in shapes and key.endswith((".row", ".col")) else (key, "full")
        parameter = name.partition("[")[0]
        if parameter not in shapes:
            raise Incompatible(
                f"the moments file {str(path)!r} does not belong to this model, which has no {parameter!r}"
            )
        shape = shapes[parameter][1:] if name != parameter else shapes[parameter]
        if len(shape) < 2:
            continue
        if parameter in transposed and oriented:
            shape = (*shape[:-2], shape[-1], shape[-2])
        expected = {"full": shape, "row": shape[:-1], "col": (*shape[:-2], shape[-1])}[form]
        if tuple(tensor.shape) != expected:
            raise Incompatible(
                f"the moments file {str(path)!r} does not belong to this model: {key!r} must have shape {expected} and "
                f"has {tuple(tensor.shape)}"
            )
        turned = parameter in transposed and not oriented
        if form == "full":
            full[name] = tensor.float().mT if turned else tensor.float()
        else:
            other = {"row": "col", "col": "row"}[form]
            sides.setdefault(name, {})[other if turned else form] = tensor.float()
    for name, pair in sides.items():
        if len(pair) < 2:
            raise CorruptArtifact(f"the moments file {str(path)!r} must hold both '{name}.row' and '{name}.col'")
    return {name: (pair["row"], pair["col"]) for name, pair in sides.items()}, full


def _is_wanted(key: str, wanted: Collection[str] | None) -> bool:
    return wanted is None or any(name.partition("[")[0] in wanted for name in (key, key[:-4]))
