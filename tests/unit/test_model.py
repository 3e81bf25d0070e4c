"""Loading: every architecture's weight matrices are found, nothing is skipped in silence, bad folders are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests import tiny
from trackstar.errors import CorruptArtifact, InvalidRequest, NotFound, UnsupportedModel
from trackstar.model import LoadedModel, Member, find_members, load_model
from trackstar.projection import BlockLayout

LAYERS = 3
# Weight matrices of one layer, counted by hand from the architecture's definition: attention and MLP.
PER_LAYER = {
    "gpt2": (2, 2),  # c_attn, c_proj; c_fc, c_proj
    "gpt_neox": (2, 2),
    "llama": (4, 3),  # q, k, v, o; gate, up, down
    "llama_tied": (4, 3),
    "mistral": (4, 3),
    "qwen2": (4, 3),
    "qwen3": (4, 3),
    "olmo": (4, 3),
    "olmo2": (4, 3),
    "gemma": (4, 3),
    "gemma2": (4, 3),
    "gemma3": (4, 3),
    "phi3": (2, 2),  # qkv, o; gate_up, down
    "mixtral": (4, 1 + 4 * 2),  # router; four experts with gate_up and down
    "qwen3_moe": (4, 1 + 4 * 2),
    "olmoe": (4, 1 + 4 * 2),
    "gpt_oss": (4, 1 + 4 * 2),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: tiny.save_model(root / name, name) for name in tiny.ARCHITECTURES}


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a small Llama that a test may damage."""
    return Path(shutil.copytree(folders["llama"], tmp_path / "checkpoint"))


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def expected_members(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Names and [out, in] of all weight matrices inside the layers, from `named_parameters` alone."""
    found: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        # Experts' biases are [experts, features]; all other parameters of two dimensions or more are weights.
        if (".layers." not in name and ".h." not in name) or parameter.ndim < 2 or name.endswith("_bias"):
            continue
        shape = tuple(parameter.shape)
        if parameter.ndim == 3:
            # gpt_oss keeps its experts' weights [in, out], as GPT-2 does.
            turned = hasattr(model.get_submodule(name.rpartition(".")[0]), "gate_up_proj_bias")
            out, in_ = (shape[2], shape[1]) if turned else (shape[1], shape[2])
            found |= {f"{name}[{expert}]": (out, in_) for expert in range(shape[0])}
        elif model.__class__.__name__.startswith("GPT2"):
            found[name] = (shape[1], shape[0])
        else:
            found[name] = (shape[0], shape[1])
    return found


def test_every_architecture_is_counted() -> None:
    assert set(PER_LAYER) == set(tiny.ARCHITECTURES)


@pytest.mark.parametrize("architecture", list(tiny.ARCHITECTURES))
def test_members_are_the_weight_matrices_of_the_layers(architecture: str, folders: dict[str, Path]) -> None:
    loaded = tiny.load(folders[architecture])
    found = {member.name: (member.out_features, member.in_features) for member in loaded.members}
    assert len(found) == len(loaded.members), "a name occurs twice"
    assert found == expected_members(loaded.model)
    assert loaded.num_layers == LAYERS
    for layer in range(LAYERS):
        members = [member for member in loaded.members if member.layer == layer]
        count = tuple(sum(member.part == part for member in members) for part in ("attention", "mlp"))
        assert count == PER_LAYER[architecture]
        assert all(f".{layer}." in member.name for member in members)
    for member in loaded.members:
        assert ("attn" in member.name or "attention" in member.name) == (member.part == "attention")


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "mixtral", "gpt_oss"])
def test_orientation_is_that_of_the_module_itself(architecture: str, folders: dict[str, Path]) -> None:
    """A row of inputs of `in_features` goes in, a row of `out_features` comes out."""
    loaded = tiny.load(folders[architecture])
    for member in loaded.members:
        if member.kind in ("linear", "conv1d"):
            module = loaded.model.get_submodule(member.module_name)
            assert module(torch.zeros(1, member.in_features)).shape == (1, member.out_features)
    kinds = {member.kind for member in loaded.members}
    assert kinds == {"gpt2": {"conv1d"}, "llama": {"linear"}}.get(architecture, {"linear", "router", "expert"})


@pytest.mark.parametrize("architecture", list(tiny.ARCHITECTURES))
def test_embeddings_and_head_are_out(architecture: str, folders: dict[str, Path]) -> None:
    loaded = tiny.load(folders[architecture])
    outside = {id(loaded.model.get_input_embeddings()), id(loaded.model.get_output_embeddings())}
    assert not any(id(loaded.model.get_submodule(member.module_name)) in outside for member in loaded.members)


def test_the_model_is_frozen_and_in_evaluation_mode(folders: dict[str, Path]) -> None:
    loaded = load_model(folders["gpt2"], dtype=torch.bfloat16)
    assert not loaded.model.training
    assert not any(module.training for module in loaded.model.modules())
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.max_tokens == 64
    assert loaded.path == str(folders["gpt2"])
    assert loaded.base is loaded.model.transformer


@pytest.mark.parametrize("architecture", ["llama", "llama_tied"])
def test_parameters_are_counted_once(architecture: str, folders: dict[str, Path]) -> None:
    loaded = tiny.load(folders[architecture])
    stored = safetensors.torch.load_file(folders[architecture] / "model.safetensors")
    assert loaded.num_parameters == sum(tensor.numel() for tensor in stored.values())


# --- the digest --------------------------------------------------------------------------------------------------


def test_the_digest_is_of_the_contents(folder: Path, tmp_path: Path) -> None:
    digest = load_model(folder).digest
    assert load_model(folder).digest == digest
    moved = Path(shutil.move(folder, tmp_path / "moved"))
    assert load_model(moved).digest == digest
    assert load_model(moved, dtype=torch.bfloat16).digest != digest
    (moved / "README.md").write_text("no part of it")
    assert load_model(moved).digest == digest


def one_weight(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


def one_setting(folder: Path) -> None:
    change_config(folder, rms_norm_eps=1e-5)


def one_token(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("change", [one_weight, one_setting, one_token])
def test_the_digest_sees_weights_settings_and_tokenizer(change: Callable[[Path], None], folder: Path) -> None:
    digest = load_model(folder).digest
    change(folder)
    assert load_model(folder).digest != digest


# --- blocks ------------------------------------------------------------------------------------------------------


def standing_in(num_layers: int) -> tuple[LoadedModel, list[Member]]:
    """Only what the layout looks at: a number of layers with two members each."""
    parts: tuple[Literal["attention", "mlp"], ...] = ("attention", "mlp")
    members = [
        Member(
            name=f"{layer}{part}", module_name="", kind="linear", layer=layer, part=part, out_features=1, in_features=1
        )
        for layer in range(num_layers)
        for part in parts
    ]
    nothing: Any = None
    return LoadedModel(
        model=nothing,
        tokenizer=nothing,
        members=tuple(members),
        num_layers=num_layers,
        max_tokens=1,
        digest="",
        path="",
    ), members


def blocks_of(num_layers: int, layer_blocks: int) -> tuple[BlockLayout, dict[int, list[tuple[int, str]]]]:
    loaded, members = standing_in(num_layers)
    layout = loaded.layout(layer_blocks=layer_blocks, rows=4, cols=8)
    assigned: dict[int, list[tuple[int, str]]] = {}
    for member in members:
        assigned.setdefault(loaded.block_of(member, layout), []).append((member.layer, member.part))
    return layout, assigned


def test_twelve_layers_in_eight_groups() -> None:
    layout, assigned = blocks_of(12, 8)
    groups = [[layer for layer, _ in assigned[2 * group]] for group in range(8)]
    assert groups == [[0, 1], [2], [3, 4], [5], [6, 7], [8], [9, 10], [11]]
    assert [block.name for block in layout.blocks[:3]] == [
        "layers 0-1 attention",
        "layers 0-1 mlp",
        "layers 2-2 attention",
    ]
    assert layout.dim == 16 * 4 * 8


def test_the_papers_layout() -> None:
    loaded, _ = standing_in(32)
    layout = loaded.layout(layer_blocks=8, rows=64, cols=64)
    assert (len(layout.blocks), layout.dim) == (16, 65536)


@given(st.integers(1, 100), st.integers(1, 40))
def test_groups_are_contiguous_even_and_complete(num_layers: int, layer_blocks: int) -> None:
    layout, assigned = blocks_of(num_layers, layer_blocks)
    num_groups = min(num_layers, layer_blocks)
    assert sorted(assigned) == list(range(2 * num_groups)) == list(range(len(layout.blocks)))
    sizes = []
    next_layer = 0
    for group in range(num_groups):
        layers = [layer for layer, _ in assigned[2 * group]]
        assert assigned[2 * group] == [(layer, "attention") for layer in layers]
        assert assigned[2 * group + 1] == [(layer, "mlp") for layer in layers]
        assert layers == list(range(next_layer, next_layer + len(layers)))
        assert layout.blocks[2 * group].name == f"layers {layers[0]}-{layers[-1]} attention"
        next_layer += len(layers)
        sizes.append(len(layers))
    assert next_layer == num_layers
    assert max(sizes) - min(sizes) <= 1


# --- weights that cannot contribute ------------------------------------------------------------------------------


class Bilinear(nn.Module):
    """A module with a weight of a kind that nobody has derived a projection for."""

    def __init__(self) -> None:
        super().__init__()
        self.tensor = nn.Parameter(torch.zeros(2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x


def fresh(folders: dict[str, Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(folders["llama"])


@pytest.mark.parametrize(
    ("module", "shapes"),
    [
        (Bilinear(), r"tensor \(2, 3, 4\)"),
        (nn.Conv1d(3, 5, 2), r"weight \(5, 3, 2\)"),
        (nn.Bilinear(2, 3, 4), r"weight \(4, 2, 3\)"),
    ],
)
def test_an_unknown_weight_is_an_error_that_names_it(module: nn.Module, shapes: str, folders: dict[str, Path]) -> None:
    model = fresh(folders)
    model.model.layers[1].mlp.extra = module
    with pytest.raises(UnsupportedModel, match=rf"'model\.layers\.1\.mlp\.extra' .*{shapes}.*--exclude 'model"):
        find_members(model)
    members, _ = find_members(model, exclude=["model.layers.1.mlp.extra"])
    assert len(members) == LAYERS * 7


def test_a_linear_outside_the_layers_is_an_error_that_names_it(folders: dict[str, Path]) -> None:
    model = fresh(folders)
    model.model.project_out = nn.Linear(4, 4)
    with pytest.raises(
        UnsupportedModel, match=r"'model\.project_out' \(Linear\) holds weights outside .*'model\.layers'"
    ):
        find_members(model)
    members, _ = find_members(model, exclude=["*.project_*"])
    assert len(members) == LAYERS * 7


def test_a_linear_that_is_neither_attention_nor_mlp_is_an_error_that_names_it(folders: dict[str, Path]) -> None:
    model = fresh(folders)
    model.model.layers[2].mixer = nn.Linear(4, 4)
    with pytest.raises(UnsupportedModel, match=r"whether 'model\.layers\.2\.mixer' belongs to attention or to the MLP"):
        find_members(model)
    assert len(find_members(model, exclude=["*.mixer"])[0]) == LAYERS * 7


def test_biases_norms_and_embeddings_do_not_matter(folders: dict[str, Path]) -> None:
    model = fresh(folders)
    model.model.layers[0].extra_norm = nn.LayerNorm(4)
    model.model.layers[0].positions = nn.Embedding(4, 4)
    assert find_members(model)[0] == find_members(fresh(folders))[0]


def test_exclude_leaves_out_what_it_names_and_nothing_else(folders: dict[str, Path]) -> None:
    everything = load_model(folders["mixtral"]).members
    cases: list[tuple[list[str], Callable[[Member], bool]]] = [
        (["*.mlp.gate"], lambda member: member.kind == "router"),
        (["*.experts", "*q_proj"], lambda member: member.kind == "expert" or "q_proj" in member.name),
        (["model.layers.0.*"], lambda member: member.layer == 0),
        (["gate"], lambda member: False),  # a whole name is matched, not a part
    ]
    for patterns, gone in cases:
        kept = load_model(folders["mixtral"], exclude=patterns).members
        assert list(kept) == [member for member in everything if not gone(member)]


def test_nothing_left_is_an_error(folders: dict[str, Path]) -> None:
    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM has no Linear or Conv1D layer"):
        load_model(folders["llama"], exclude=["*"])


def test_layers_that_cannot_be_found_are_an_error(folders: dict[str, Path]) -> None:
    model = fresh(folders)
    model.config.num_hidden_layers = 7
    with pytest.raises(UnsupportedModel, match="no list of 7 decoder layers"):
        find_members(model)


def test_other_lists_of_the_same_length_are_not_taken_for_the_layers(tmp_path: Path) -> None:
    """Three layers with three experts each, as modules of their own."""
    loaded = tiny.load(tiny.save_model(tmp_path, "mixtral", num_local_experts=LAYERS))
    members = tiny.with_plain_experts(loaded).members
    assert sorted({member.layer for member in members}) == list(range(LAYERS))
    assert len(members) == LAYERS * (4 + 1 + LAYERS * 2)


# --- folders that are refused ------------------------------------------------------------------------------------


def test_a_missing_folder_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no checkpoint folder"):
        load_model(tmp_path / "none")


def test_the_name_of_a_hub_model_is_not_downloaded() -> None:
    with pytest.raises(NotFound, match="no checkpoint folder 'openai-community/gpt2'"):
        load_model("openai-community/gpt2")


def test_a_missing_config_is_not_found(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(NotFound, match=r"holds no config\.json"):
        load_model(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(NotFound, match=r"holds no \.safetensors file.*pickled weights are refused"):
        load_model(folder)
    # Nor do they come in behind some other file of safetensors.
    safetensors.torch.save_file({"x": torch.zeros(1)}, folder / "correction.safetensors")
    with pytest.raises((InvalidRequest, CorruptArtifact)):
        load_model(folder)


def test_remote_code_is_refused_and_does_not_run(folder: Path, tmp_path: Path) -> None:
    change_config(
        folder, model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    )
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(
        InvalidRequest, match="needs code that it brings along; read that code, then pass --trust-remote-code"
    ):
        load_model(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "gemma"])
@pytest.mark.parametrize("left", ["nothing", "settings"])
def test_a_missing_tokenizer_is_not_found(
    architecture: str, left: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Some tokenizer classes come without files too, and know nothing but their special tokens."""
    folder = Path(shutil.copytree(folders[architecture], tmp_path / "checkpoint"))
    (folder / "tokenizer.json").unlink()
    if left == "nothing":
        (folder / "tokenizer_config.json").unlink()
    with pytest.raises(NotFound, match="no usable tokenizer; save it beside the model with save_pretrained"):
        load_model(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"{}"])
def test_a_damaged_tokenizer_is_not_found(content: bytes, folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(NotFound, match="no usable tokenizer"):
        load_model(folder)


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: data[:4], lambda data: b"\0" * 10])
def test_damaged_weights_are_corrupt(damage: Callable[[bytes], bytes], folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CorruptArtifact, match=r"weights in '.*checkpoint' are truncated or damaged.*copy them again"):
        load_model(folder)


def test_missing_weights_are_not_made_up(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CorruptArtifact, match=r"lack 'model\.layers\.2\.mlp\.up_proj\.weight' \(1 parameters in all\)"):
        load_model(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "t5"},
        {"model_type": "unheard_of"},
        {"hidden_size": 32},  # the weights have 16
        {"hidden_size": "16"},
        {"model_type": None},
    ],
)
def test_what_is_no_causal_language_model_is_refused(changes: dict[str, Any], folder: Path) -> None:
    change_config(folder, **changes)
    with pytest.raises(InvalidRequest, match=r"cannot be loaded as a causal language model: ."):
        load_model(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_a_damaged_config_is_refused(content: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(InvalidRequest, match=r"cannot be loaded as a causal language model: ."):
        load_model(folder)
