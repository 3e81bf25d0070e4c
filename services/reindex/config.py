"""Settings of a reindex job: what is built, who does the work, where the codes go and what must hold before it serves.

index: s3://bucket/index        # folder or URL of the index
build: {corpus: …, model: …}    # as of `trackstar index --config`
workers: {encoders: {min: 1, max: 8, gpus: 1}}
milvus: {address: milvus:19530} # as of the gateway; for codes with the store `milvus`
audit: {min_recall: 0.95}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from services.gateway.config import MilvusConfig
from trackstar.index_config import IndexConfig, read_config, refusal


class Pool(BaseModel):
    """Actors of one kind; Ray starts more while there is work and room for them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min: int = Field(default=1, ge=1, description="actors at least")
    max: int = Field(default=1, ge=1, description="actors at most")
    cpus: float = Field(
        default=1.0, ge=0, description="processors that Ray counts for each, in cores; may be a fraction"
    )
    gpus: float = Field(default=0.0, ge=0, description="GPUs of each")
    memory_bytes: int | None = Field(default=None, ge=1, description="memory that Ray counts for each, bytes")

    @model_validator(mode="after")
    def _is_ordered(self) -> Pool:
        if self.min > self.max:
            raise ValueError("min must not be above max")
        return self


class GangPool(BaseModel):
    """One encoder spread over several actors; with one rank an encoder is one actor."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ranks: int = Field(default=1, ge=1, le=64, description="actors that hold one model together")
    strategy: Literal["tensor", "fsdp"] = Field(
        default="tensor", description="tensor: each rank a slice of every layer; fsdp: layers gathered when needed"
    )
    cpus: float = Field(default=1.0, ge=0, description="processors of each rank, in cores")
    gpus: float = Field(default=0.0, ge=0, description="GPUs of each rank")


class Workers(BaseModel):
    """Who does the work."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    readers: Pool = Field(default=Pool(), description="read and tokenise the corpus to plan")
    encoders: Pool = Field(default=Pool(), description="hold the model; of a gang, lead it")
    gang: GangPool = GangPool()
    scanners: Pool = Field(default=Pool(), description="read rows: statistics, codes, purging, audit")
    whitener: Pool = Field(default=Pool(), description="one actor that takes eigenvectors")
    importers: Pool = Field(default=Pool(), description="send codes to Milvus")
    torch_threads: int = Field(default=1, ge=1, description="threads of torch in each actor")
    retries: int = Field(default=8, ge=0, description="tries more of an item whose store, gang or server is not ready")


class BulkImport(BaseModel):
    """A folder that the workers write and Milvus reads; codes go there as Parquet files instead of through calls."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: str = Field(description="folder or URL, as the workers name it")
    server_folder: str = Field(description="the same as the server names it: below its bucket, or an absolute path")


class ReindexConfig(BaseModel):
    """A job. Unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    index: str = Field(description="folder or URL of the index")
    build: IndexConfig
    workers: Workers = Workers()
    milvus: MilvusConfig = MilvusConfig()
    bulk: BulkImport | None = Field(default=None, description="bulk imports, where the server does them; null: upserts")
    verify: bool = Field(default=False, description="compare every finished shard with its digests first")
    ray_address: str | None = Field(
        default=None, description="of a Ray cluster; null: the one this runs in, or else one of its own"
    )

    @model_validator(mode="after")
    def _goes_together(self) -> ReindexConfig:
        if self.build.code.store == "milvus" and self.milvus.address is None:
            raise ValueError("codes with the store 'milvus' need milvus.address")
        return self


def load(path: Path) -> ReindexConfig:
    """The settings in a YAML file.

    Raises:
        NotFound: no such file.
        InvalidRequest: an unknown key, or a value out of range; the message names it.
    """
    return make(read_config(path))


def make(content: dict[str, Any]) -> ReindexConfig:
    """Validate settings; raises as `load`."""
    try:
        return ReindexConfig(**content)
    except ValidationError as error:
        raise refusal(error) from error
