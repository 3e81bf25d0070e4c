"""Loading a checkpoint and finding the weight matrices that contribute to a row.

Contract: `load_model` returns the frozen model, its tokenizer, a digest of what was loaded, and one `Member` for every
weight matrix inside the decoder layers: Linear and Conv1D modules, routers, and fused experts. Embeddings, the language
model head, norms and biases are out (METHOD). A weight with two or more dimensions that is none of these is an error
that names it: nothing that should contribute is skipped in silence, and nothing is filled with random numbers because
the checkpoint lacks it. Only safetensors are read, and remote code is refused unless it is asked for.

What it does not do: compute anything. Hooks live in `capture`, moments in `moments`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from trackstar.errors import CorruptArtifact, InvalidRequest, NotFound, UnsupportedModel
from trackstar.projection import Block, BlockLayout
from trackstar.ranks import ALONE, Ranks

MemberKind = Literal["linear", "conv1d", "router", "expert"]

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_forward|moe|expert|\bfc[12]\b", re.IGNORECASE)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One weight matrix [out_features, in_features] that contributes to a block.

    `name` is the parameter's name; a fused expert adds its index, as in `…experts.down_proj[3]`. `cut` is what this
    process holds of it, as ranges of output and input features, where that is not all.
    """

    name: str
    module_name: str
    kind: MemberKind
    layer: int
    part: Literal["attention", "mlp"]
    out_features: int
    in_features: int
    cut: tuple[range, range] | None = None

    @property
    def held_out(self) -> range:
        """Output features that this process holds."""
        return self.cut[0] if self.cut else range(self.out_features)

    @property
    def held_in(self) -> range:
        """Input features that this process holds."""
        return self.cut[1] if self.cut else range(self.in_features)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A frozen checkpoint in evaluation mode with the members found in it.

    `ranks` are the processes that hold it together (see `sharding`).
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    members: tuple[Member, ...]
    num_layers: int
    max_tokens: int
    digest: str
    path: str
    ranks: Ranks = ALONE

    @property
    def base(self) -> nn.Module:
        """The decoder without its language-model head."""
        base: nn.Module = self.model.base_model
        return base

    @property
    def num_parameters(self) -> int:
        """All parameters, tied ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def layout(self, *, layer_blocks: int, rows: int, cols: int) -> BlockLayout:
        """Blocks in the order (group of layers, attention before MLP)."""
        groups = min(layer_blocks, self.num_layers)
        blocks = []
        for group in range(groups):
            layers = [layer for layer in range(self.num_layers) if layer * groups // self.num_layers == group]
            for part in ("attention", "mlp"):
                blocks.append(Block(name=f"layers {layers[0]}-{layers[-1]} {part}", rows=rows, cols=cols))
        return BlockLayout(blocks=tuple(blocks))

    def block_of(self, member: Member, layout: BlockLayout) -> int:
        """Index of the block that `member` adds to."""
        groups = len(layout.blocks) // 2
        return 2 * (member.layer * groups // self.num_layers) + (member.part == "mlp")


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    trust_remote_code: bool = False,
    exclude: Sequence[str] = (),
) -> LoadedModel:
    """Load a Hugging Face causal language model from a folder with safetensors.

    Args:
        path: the checkpoint's folder.
        dtype: precision of weights and activations.
        device: a torch device.
        trust_remote_code: run Python code that the folder brings; refused by default.
        exclude: shell patterns of module names left out on purpose.

    Raises:
        NotFound: no such folder, or no safetensors or no tokenizer in it.
        InvalidRequest: the folder needs remote code, or is not a causal language model.
        CorruptArtifact: its weights are unreadable or incomplete.
        UnsupportedModel: a weight should contribute and cannot.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise NotFound(f"there is no checkpoint folder {str(path)!r}; give the folder that holds config.json")
    if not (folder / "config.json").is_file():
        raise NotFound(f"{str(path)!r} holds no config.json; give the folder of a Hugging Face checkpoint")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise NotFound(
            f"{str(path)!r} holds no .safetensors file; save the model again with save_pretrained "
            "(pickled weights are refused)"
        )
    arguments: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(folder, **arguments)
        loading: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **arguments
        )
    except SafetensorError as error:
        raise CorruptArtifact(
            f"the weights in {str(path)!r} are truncated or damaged ({error}); copy them again"
        ) from error
    except (ValueError, OSError, KeyError, RuntimeError, StrictDataclassError) as error:
        if "trust_remote_code" in str(error):
            raise InvalidRequest(
                f"{str(path)!r} needs code that it brings along; read that code, then pass --trust-remote-code"
            ) from error
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InvalidRequest(f"{str(path)!r} cannot be loaded as a causal language model: {first_line}") from error
    model, report = loading
    if missing := sorted(report["missing_keys"]):
        raise CorruptArtifact(
            f"the weights in {str(path)!r} lack {missing[0]!r} ({len(missing)} parameters in all); "
            "give a complete checkpoint"
        )
    tokenizer = _load_tokenizer(folder, arguments)
    model = model.to(device).eval().requires_grad_(False)
    members, num_layers = find_members(model, exclude=exclude)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        members=members,
        num_layers=num_layers,
        max_tokens=_max_tokens(config.get_text_config()),
        digest=_digest([folder / "config.json", *weights, *_tokenizer_files(folder)], dtype),
        path=str(path),
    )


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> tuple[PreTrainedTokenizerBase, int]:
    """The tokenizer of a checkpoint and the model's window in tokens, without its weights.

    Raises:
        NotFound: no tokenizer in the folder.
        InvalidRequest: the folder needs remote code, or its configuration cannot be read.
    """
    arguments: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(path, **arguments)
    except (ValueError, OSError, KeyError) as error:
        raise InvalidRequest(f"the configuration in {str(path)!r} cannot be read: {error}") from error
    return _load_tokenizer(Path(path), arguments), _max_tokens(config.get_text_config())


def _load_tokenizer(folder: Path, arguments: dict[str, Any]) -> PreTrainedTokenizerBase:
    problem = f"{str(folder)!r} holds no usable tokenizer; save it beside the model with save_pretrained"
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **arguments)
    except (ValueError, OSError, KeyError) as error:
        raise NotFound(problem) from error
    # Without files some classes give a tokenizer that knows its special tokens only and turns every text into nothing.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise NotFound(problem)
    return tokenizer


def _tokenizer_files(folder: Path) -> list[Path]:
    """What decides how text is cut; other files of a tokenizer hold chat templates, which may change."""
    return [file for name in _TOKENIZER_FILES if (file := folder / name).is_file()]


def _max_tokens(text_config: Any) -> int:
    for name in ("max_position_embeddings", "n_positions"):
        if found := getattr(text_config, name, None):
            return int(found)
    return 2048


def find_members(model: PreTrainedModel, *, exclude: Sequence[str] = ()) -> tuple[tuple[Member, ...], int]:
    """The contributing weight matrices in module order, and the number of decoder layers.

    Raises:
        UnsupportedModel: no decoder layers found, or a weight that should contribute and cannot; the message names it.
    """
    layers_name, num_layers = decoder_layers(model)
    outside = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    members: list[Member] = []
    for module_name, module in model.named_modules():
        weights = {name: p for name, p in module.named_parameters(recurse=False) if p.ndim >= 2}
        if not weights or id(module) in outside or isinstance(module, nn.Embedding):
            continue
        if any(fnmatch(module_name, pattern) for pattern in exclude):
            continue
        if not module_name.startswith(layers_name + "."):
            raise UnsupportedModel(
                f"{module_name!r} ({type(module).__name__}) holds weights outside the decoder layers {layers_name!r}; "
                f"leave it out on purpose with --exclude {module_name!r}"
            )
        layer, _, inner = module_name[len(layers_name) + 1 :].partition(".")
        for kind, weight_name, out_features, in_features in _matrices(module, module_name, weights):
            members.append(
                Member(
                    name=weight_name,
                    module_name=module_name,
                    kind=kind,
                    layer=int(layer),
                    part=_part(inner, module_name),
                    out_features=out_features,
                    in_features=in_features,
                )
            )
    if not members:
        raise UnsupportedModel(
            f"{type(model).__name__} has no Linear or Conv1D layer in {layers_name!r} that could contribute"
        )
    return tuple(members), num_layers


def is_fused_experts(module: nn.Module) -> bool:
    """Whether the module holds all experts of a layer in 3-D parameters behind transformers' experts interface."""
    return all(hasattr(module, name) for name in ("_apply_gate", "is_transposed", "has_gate", "has_bias", "down_proj"))


def _matrices(
    module: nn.Module, module_name: str, weights: dict[str, nn.Parameter]
) -> Iterator[tuple[MemberKind, str, int, int]]:
    if isinstance(module, nn.Linear):
        yield "linear", f"{module_name}.weight", module.out_features, module.in_features
    elif isinstance(module, Conv1D):
        in_features, out_features = module.weight.shape
        yield "conv1d", f"{module_name}.weight", out_features, in_features
    elif is_fused_experts(module):
        for name, weight in weights.items():
            if weight.ndim != 3:  # the biases of experts are [experts, features]
                continue
            first, second = weight.shape[1:]
            out_features, in_features = (second, first) if module.is_transposed else (first, second)
            for expert in range(weight.shape[0]):
                yield "expert", f"{module_name}.{name}[{expert}]", out_features, in_features
    elif set(weights) == {"weight"} and weights["weight"].ndim == 2:
        # A router: transformers keeps its matrix as a bare parameter. Capture checks that it is applied linearly.
        out_features, in_features = weights["weight"].shape
        yield "router", f"{module_name}.weight", out_features, in_features
    else:
        shapes = ", ".join(f"{name} {tuple(weight.shape)}" for name, weight in weights.items())
        raise UnsupportedModel(
            f"{module_name!r} ({type(module).__name__}) holds weights that cannot contribute yet: {shapes}; "
            f"leave it out on purpose with --exclude {module_name!r}"
        )


def _part(inner: str, module_name: str) -> Literal["attention", "mlp"]:
    if _ATTENTION.search(inner):
        return "attention"
    if _MLP.search(inner):
        return "mlp"
    raise UnsupportedModel(
        f"cannot tell whether {module_name!r} belongs to attention or to the MLP; leave it out on purpose with "
        f"--exclude {module_name!r}"
    )


def decoder_layers(model: PreTrainedModel) -> tuple[str, int]:
    """Name and length of the list of decoder layers.

    Raises:
        UnsupportedModel: there is none.
    """
    num_layers = int(model.config.get_text_config().num_hidden_layers)
    candidates = [
        (sum(p.numel() for p in module.parameters()), name)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    if not candidates:
        raise UnsupportedModel(f"{type(model).__name__} has no list of {num_layers} decoder layers")
    return max(candidates)[1], num_layers


def _digest(files: Sequence[Path], dtype: torch.dtype) -> str:
    digest = hashlib.sha256(str(dtype).encode())
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()
