"""Layers and parameters of a checkpoint, read from its config and the headers of its weights.

Contract: needs no torch and reads no weights, so that planning works on any machine. Tied weights are stored once and
counted once; buffers saved among the weights are counted too.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from trackstar.errors import CorruptArtifact, InvalidRequest, NotFound
from trackstar.storage import read_json


def model_size(folder: str | Path) -> tuple[int, int]:
    """(number of layers, number of parameters) of a Hugging Face checkpoint folder.

    Raises:
        NotFound: no such folder, or no config or safetensors in it.
        InvalidRequest: the config does not say how many layers there are.
        CorruptArtifact: a file's header is unreadable.
    """
    root = Path(folder)
    if not root.is_dir():
        raise NotFound(f"there is no checkpoint folder {str(folder)!r}; give the folder that holds config.json")
    config = read_json(root / "config.json")
    layers = _layers(config) or _layers(config.get("text_config", {}))
    if layers is None:
        raise InvalidRequest(f"{str(root / 'config.json')!r} names no number of layers; give --layers and --params")
    files = sorted(root.glob("*.safetensors"))
    if not files:
        raise NotFound(f"{str(folder)!r} holds no .safetensors file; give --layers and --params instead")
    return layers, sum(_parameters(path) for path in files)


def _layers(config: Any) -> int | None:
    found = next((config[key] for key in ("num_hidden_layers", "n_layer", "num_layers") if config.get(key)), None)
    return None if found is None else int(found)


def _parameters(path: Path) -> int:
    try:
        with safe_open(path, "np") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise CorruptArtifact(f"{str(path)!r} is truncated or no safetensors file; copy it anew") from error
