"""Settings of the Serve application: the arguments of `services.serve.app:application` in a Serve config file."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

# What Serve's gRPC proxy must know before it starts: `grpc_options.grpc_servicer_functions` of its config.
SERVICER_FUNCTIONS = [
    "trackstar.v1.encoder_pb2_grpc.add_EncoderServiceServicer_to_server",
    "trackstar.v1.reranker_pb2_grpc.add_RerankerServiceServicer_to_server",
]


class Scaling(BaseModel):
    """How many replicas a deployment has, and what each holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_replicas: int = Field(default=1, ge=1, description="replicas at least")
    max_replicas: int = Field(default=1, ge=1, description="replicas at most")
    target_ongoing_requests: float = Field(
        default=8, gt=0, description="calls under way in a replica that autoscaling aims at"
    )
    max_ongoing_requests: int = Field(
        default=64, ge=1, description="calls that a replica takes; the rest waits outside"
    )
    max_queued_requests: int = Field(
        default=256, ge=-1, description="calls that wait for a replica in each caller; more are refused, -1: none are"
    )
    cpus: float = Field(default=1.0, ge=0, description="processors that Ray counts for a replica, in cores")
    gpus: float = Field(default=0.0, ge=0, description="GPUs of a replica")


class GangConfig(BaseModel):
    """How one model is spread over several actors. With one rank a replica is one actor."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ranks: int = Field(default=1, ge=1, le=64, description="actors that hold one model together")
    strategy: Literal["tensor", "fsdp"] = Field(
        default="tensor", description="tensor: each rank a slice of every layer; fsdp: layers gathered when needed"
    )
    cpus: float = Field(default=1.0, ge=0, description="processors of each rank, in cores")
    gpus: float = Field(default=0.0, ge=0, description="GPUs of each rank")


class ServeConfig(BaseModel):
    """The application. Unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    index: str = Field(description="folder or URL of the index")
    model: str | None = Field(default=None, description="folder of the checkpoint, if it is not where the index says")
    device: str = Field(default="cpu", description="torch device of a replica, such as cpu or cuda")
    trust_remote_code: bool = Field(default=False, description="run code that the checkpoint brings")
    encoder: Scaling = Scaling()
    reranker: Scaling = Scaling()
    ingress: Scaling = Scaling(max_ongoing_requests=512)
    gang: GangConfig = GangConfig()
    max_waiting_tokens: int = Field(default=65_536, ge=1, description="tokens of queries that wait in one replica")
    torch_threads: int = Field(default=1, ge=1, description="threads of torch in each replica or rank")
    health_check_seconds: float = Field(default=2.0, gt=0, description="time between health checks of a replica")
    tracing_endpoint: str | None = Field(
        default=None, description="OTLP gRPC endpoint for spans; none are made without"
    )
