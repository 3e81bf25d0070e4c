"""Reads safetensors files from a local folder or an object store, whole or the tensors of some names.

A local file is mapped by the format's own library. Of one in an object store only the bytes of the header and of the
wanted tensors are moved, and the library reads them as a file of those tensors alone, with all its checks.

Only `load_tensors` needs torch.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from trackstar.blobs import Location, RemotePath

if TYPE_CHECKING:
    from torch import Tensor

_MAX_HEADER = 100 << 20  # as the library has it


def load_tensors(path: Location, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """The tensors of a file by name; of a local file always all.

    Args:
        path: the file.
        names: which are wanted; all if None.

    Raises:
        FileNotFoundError, NotFound: no such file, locally or in a store.
        NotReady: the store does not answer.
        SafetensorError: it cannot be read.
    """
    import safetensors.torch

    if not isinstance(path, RemotePath):
        return safetensors.torch.load_file(path)
    return safetensors.torch.load(path.read_bytes() if names is None else _part(path, names))


def load_arrays(path: Location, names: Collection[str] | None = None) -> dict[str, NDArray[Any]]:
    """As `load_tensors`, as arrays; of types that numpy has, and of a local file too only what is wanted."""
    if isinstance(path, RemotePath):
        return safetensors.numpy.load(path.read_bytes() if names is None else _part(path, names))
    with safetensors.safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}


def _part(path: RemotePath, names: Collection[str]) -> bytes:
    with path.open("rb") as stream:
        try:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, _MAX_HEADER)))
            spans = {name: header[name]["data_offsets"] for name in names}
            ranges = [(path.key, 8 + length + start, 8 + length + stop) for start, stop in spans.values()]
        except (struct.error, ValueError, KeyError, TypeError) as error:
            raise SafetensorError(f"its header is unreadable: {error}") from error
    kept, at = {}, 0
    for name, (start, stop) in spans.items():
        kept[name] = {**header[name], "data_offsets": [at, at := at + stop - start]}
    data = b"".join(path.store.read_ranges(ranges))
    described = json.dumps(kept).encode()
    return struct.pack("<Q", len(described)) + described + data
