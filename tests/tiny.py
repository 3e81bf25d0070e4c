"""Tiny models of every supported architecture, saved from a configuration the way a user's checkpoint would be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from trackstar.model import LoadedModel, find_members, is_fused_experts, load_model

VOCABULARY = 97
_SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
_GROUPED = {**_SIZE, "num_key_value_heads": 1, "head_dim": 8}
_EXPERTS = {**_GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 12}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 64}),
    "gpt_neox": ("gpt_neox", _SIZE),
    "llama": ("llama", _GROUPED),
    "llama_tied": ("llama", {**_GROUPED, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**_GROUPED, "sliding_window": 6}),
    "qwen2": ("qwen2", _GROUPED),
    "qwen3": ("qwen3", _GROUPED),
    "olmo": ("olmo", _GROUPED),
    "olmo2": ("olmo2", _GROUPED),
    "gemma": ("gemma", {**_GROUPED, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", {**_GROUPED, "tie_word_embeddings": True, "sliding_window": 6, "query_pre_attn_scalar": 8}),
    "gemma3": (
        "gemma3_text",
        {**_GROUPED, "tie_word_embeddings": True, "sliding_window": 6, "query_pre_attn_scalar": 8},
    ),
    "phi3": ("phi3", {**_GROUPED, "pad_token_id": 0}),
    "mixtral": ("mixtral", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("qwen3_moe", {**_EXPERTS, "num_experts": 4, "decoder_sparse_step": 1, "mlp_only_layers": []}),
    "olmoe": ("olmoe", {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("gpt_oss", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6}),
}


def save_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of 97 entries, enough for plain ASCII text."""
    vocabulary = {"<|endoftext|>": 0}
    for code in range(32, 127):
        character = "Ġ" if code == 32 else chr(code)
        vocabulary[character] = len(vocabulary)
    vocabulary["Ċ"] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    ).save_pretrained(folder)


def save_model(folder: Path, architecture: str, *, seed: int = 0, scale: float = 1.0, **overrides: Any) -> Path:
    """Save a randomly initialised model and its tokenizer; larger weights than usual make gradients well-
    conditioned."""
    model_type, settings = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**settings, **overrides}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, scale * parameter.shape[-1] ** -0.5)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Load what `save_model` saved."""
    return load_model(folder, dtype=dtype)


def with_plain_experts(loaded: LoadedModel) -> LoadedModel:
    """The same model with every fused experts module taken apart."""
    for name, module in list(loaded.model.named_modules()):
        if is_fused_experts(module):
            loaded.model.set_submodule(name, PlainExperts(module))
    loaded.model.requires_grad_(False)
    members, _ = find_members(loaded.model)
    return replace(loaded, members=members)


class PlainExperts(nn.Module):
    """Fused experts taken apart into Linear modules that see routed tokens only, as older checkpoints' own code
    does."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.act_fn = fused.act_fn
        self.experts = nn.ModuleList()
        for gate_up, down in zip(fused.gate_up_proj, fused.down_proj, strict=True):
            expert = nn.Module()
            expert.up = nn.Linear(gate_up.shape[1], gate_up.shape[0], bias=False, dtype=gate_up.dtype)
            expert.down = nn.Linear(down.shape[1], down.shape[0], bias=False, dtype=down.dtype)
            expert.up.weight.data.copy_(gate_up)
            expert.down.weight.data.copy_(down)
            self.experts.append(expert)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        total = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(top_k_index == index)
            if not len(token):
                continue
            gate, up = expert.up(hidden_states[token]).chunk(2, dim=-1)  # type: ignore[operator]
            out = expert.down(self.act_fn(gate) * up)  # type: ignore[operator]
            total = total.index_add(0, token, out * top_k_weights[token, slot, None])
        return total
