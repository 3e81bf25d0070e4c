"""The Serve application: an ingress that speaks gRPC, encoder replicas that hold the model, rerankers beside the rows.

    Serve's gRPC proxy ─► Ingress ─┬─► Encoder   (one actor, or a gang with one sharded model)
                                   └─► Reranker ─► Encoder (token shares)

    serve run services.serve.app:application index=my-index        (or a Serve config file with the same arguments)

Serve places, restarts, scales and balances.
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import AutoscalingConfig

from services.serve.config import Scaling, ServeConfig
from services.serve.encoder import EncoderReplica
from services.serve.ingress import Ingress
from services.serve.reranker import RerankerReplica


def application(arguments: dict[str, Any]) -> Application:
    """The bound application.

    Args:
        arguments: of Serve's config file or command line, as `ServeConfig` has them.
    """
    config = ServeConfig(**arguments)
    encoder = _deployment(EncoderReplica, "Encoder", _encoder_options(config)).bind(config)
    reranker = _deployment(RerankerReplica, "Reranker", _options(config, config.reranker)).bind(config, encoder)
    return _deployment(Ingress, "Ingress", _options(config, config.ingress)).bind(config, encoder, reranker)


def _deployment(replica: type, name: str, options: dict[str, Any]) -> Deployment:
    made: Deployment = serve.deployment(**options, name=name)(replica)
    return made


def _options(config: ServeConfig, scaling: Scaling) -> dict[str, Any]:
    fixed = scaling.min_replicas == scaling.max_replicas
    return {
        "max_ongoing_requests": scaling.max_ongoing_requests,
        "max_queued_requests": scaling.max_queued_requests,
        "health_check_period_s": config.health_check_seconds,
        "ray_actor_options": {"num_cpus": scaling.cpus, "num_gpus": scaling.gpus},
        **(
            {"num_replicas": scaling.min_replicas}
            if fixed
            else {
                "autoscaling_config": AutoscalingConfig(
                    min_replicas=scaling.min_replicas,
                    max_replicas=scaling.max_replicas,
                    target_ongoing_requests=scaling.target_ongoing_requests,
                )
            }
        ),
    }


def _encoder_options(config: ServeConfig) -> dict[str, Any]:
    options = _options(config, config.encoder)
    if config.gang.ranks > 1:
        # The replica itself sits in the first bundle, its ranks in the others.
        rank = {"CPU": config.gang.cpus, **({"GPU": config.gang.gpus} if config.gang.gpus else {})}
        options["placement_group_bundles"] = [{"CPU": config.encoder.cpus}, *[rank] * config.gang.ranks]
        options["placement_group_strategy"] = "PACK"
        options["ray_actor_options"] = {"num_cpus": config.encoder.cpus}
    return options
