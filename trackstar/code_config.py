"""How a generation's coarse code is chosen: its kind and size, and the store it is searched in.

Configuration only: it reads no files, and needs no torch, so that whoever only forwards codes can know their shape.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trackstar.codes import CodeKind, CodeSpec, padded_dim

# Twice the floats halve the noise's square and double Milvus Lite's time and memory.
DEFAULT_PREFIX = 1024


class CodeConfig(BaseModel):
    """The coarse code. `store` says where it is searched: Milvus Lite holds float prefixes; memory and a Milvus server,
    which is named by whoever fills and asks it, hold both kinds.

    `size` left out becomes 1,024 floats, or as many bits as the rotated vector has coordinates.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: CodeKind = "prefix"
    size: int | None = Field(default=None, ge=8)
    store: Literal["milvus-lite", "memory", "milvus"] = "milvus-lite"
    seed: int = 0

    @model_validator(mode="after")
    def _check(self) -> CodeConfig:
        if self.store == "milvus-lite" and self.kind != "prefix":
            raise ValueError("Milvus Lite holds no bits; use the kind 'prefix' or the store 'memory'")
        return self

    def spec(self, dim: int) -> CodeSpec:
        """The code of vectors of dimension `dim`, without where it is kept."""
        largest = padded_dim(dim)
        default = min(DEFAULT_PREFIX, largest) if self.kind == "prefix" else largest
        return CodeSpec(kind=self.kind, size=self.size or default, seed=self.seed)
