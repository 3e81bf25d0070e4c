"""Reads safetensors files from a local folder or an object store, whole or the tensors of some names.

A local file is mapped by the format's own library. Of one in an object store only the bytes of the header and of the
wanted tensors are moved, and the library reads them as a file of those tensors alone, with all its checks.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Collection

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from trackstar.blobs import Location, RemotePath

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
    if not isinstance(path, RemotePath):
        return safetensors.torch.load_file(path)
    return safetensors.torch.load(path.read_bytes() if names is None else _part(path, names))


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
