"""Vectors between messages and arrays: bytes, type and dimension; sizes are checked, nothing is copied."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trackstar.errors import InvalidRequest
from trackstar.v1.common_pb2 import Dtype, Vector

_NUMPY: dict[Dtype.ValueType, np.dtype[Any]] = {
    Dtype.DTYPE_FLOAT32: np.dtype("<f4"),
    Dtype.DTYPE_INT64: np.dtype("<i8"),
    Dtype.DTYPE_BITS: np.dtype("u1"),
}


def to_vector(values: NDArray[Any]) -> Vector:
    """One vector [dim], or several [N, dim], of float32, int64 or packed bits (uint8)."""
    dtype = next(known for known, numpy in _NUMPY.items() if numpy == values.dtype)
    dim = values.shape[-1] * (8 if dtype == Dtype.DTYPE_BITS else 1)
    return Vector(data=values.tobytes(), dtype=dtype, dim=dim)


def to_array(vector: Vector, dtype: Dtype.ValueType, *, dim: int | None, name: str) -> NDArray[Any]:
    """The numbers as a read-only view: [N, dim], [N, dim / 8] for bits.

    Args:
        vector: the message.
        dtype: the type it must have.
        dim: the dimension it must have; any if None.
        name: the field, for the error.

    Raises:
        InvalidRequest: another type, dimension or number of bytes.
    """
    if vector.dtype != dtype:
        raise InvalidRequest(f"{name}: has type {Dtype.Name(vector.dtype)}, {Dtype.Name(dtype)} is expected")
    if dim is not None and vector.dim != dim:
        raise InvalidRequest(f"{name}: has dimension {vector.dim}, {dim} is expected")
    numpy = _NUMPY[dtype]
    if vector.dim == 0:
        if vector.data:
            raise InvalidRequest(f"{name}: has {len(vector.data)} bytes but dimension 0")
        return np.empty((0, 0), dtype=numpy)
    row_bytes = vector.dim // 8 if dtype == Dtype.DTYPE_BITS else vector.dim * numpy.itemsize
    if row_bytes == 0 or len(vector.data) % row_bytes:
        raise InvalidRequest(f"{name}: {len(vector.data)} bytes are no whole number of vectors of {row_bytes} bytes")
    return np.frombuffer(vector.data, dtype=numpy).reshape(-1, row_bytes // numpy.itemsize)
