"""What the client of a gateway asks with and gets back, beside the values it shares with the library (`results`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypedDict

from trackstar.passages import Passage
from trackstar.results import Influence, Trace

Ends = Literal["both", "proponents", "opponents"]
Exactness = Literal["auto", "cascade", "exhaustive"]
EvidenceKind = Literal["tokens", "blocks", "overlap"]
Optimizer = Literal["sgd", "adamw"]
State = Literal["unknown", "building", "ready", "active", "retired"]

ALL_EVIDENCE: tuple[EvidenceKind, ...] = ("tokens", "blocks", "overlap")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """Encryption of a connection. `ca`: PEM of who signed the server, the system's if None; `certificate` and `key`:
    PEM of who the client is, if the server wants to know."""

    ca: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A span of a completion is explained: characters `start` to `end` (exclusive); what is before it is given."""

    completion: str
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """The model's own continuation is explained, of `max_new_tokens` at most."""

    max_new_tokens: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which passages may be returned; dates are ISO 8601, or prefixes such as 2019 or 2019-05."""

    sources: Sequence[str] = ()
    date_from: str = ""
    date_until: str = ""
    date_field: str = "date"
    metadata: Mapping[str, Sequence[str]] = field(default_factory=dict)


class TraceOptions(TypedDict, total=False):
    """What a trace may be asked with; the server's defaults hold for what is left out.

    generation: its name; the active one if left out. k: passages per ranking, 10. ends: which rankings, both. filter:
    which passages may be returned. evidence: kinds wanted, all. exactness: "auto" scores every passage where that costs
    no more. candidates: that the coarse search proposes for each ranking, 1,000. complete: also say what the model
    itself says. request_id: names the request in the server's logs.
    """

    generation: str
    k: int
    ends: Ends
    filter: Filter | None
    evidence: Iterable[EvidenceKind]
    exactness: Exactness
    candidates: int
    complete: bool
    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Explained:
    """How the model read the query. `text`: what was explained; `loss`: of it, summed, in nats; `model_completion`:
    what the model itself says, "" unless asked for."""

    text: str
    loss: float
    probability: float
    num_tokens: int
    model_completion: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where an answer comes from. `seconds`: by stage; `left_out`: a sentence on each thing that is missing."""

    generation: str
    checkpoint_digest: str
    config_digest: str
    exactness: Exactness
    candidates_examined: int
    passages_total: int
    seconds: Mapping[str, float]
    left_out: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A trace, or one page of it. `next_page_token` gets the next page; "" on the last."""

    trace: Trace
    explained: Explained
    provenance: Provenance
    request_id: str
    next_page_token: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPart:
    """The query has been read."""

    request_id: str
    generation: str
    explained: Explained


@dataclass(frozen=True, slots=True, kw_only=True)
class CoarsePart:
    """The best candidates as (passage id, estimated score)."""

    proponents: tuple[tuple[int, float], ...]
    opponents: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedPart:
    """The best passages so far, without evidence; `final` says that no others follow."""

    proponents: tuple[Influence, ...]
    opponents: tuple[Influence, ...]
    candidates_examined: int
    final: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EvidencePart:
    """Some of the final passages, with their evidence."""

    proponents: tuple[Influence, ...]
    opponents: tuple[Influence, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DonePart:
    """The end: everything that came before, as one answer."""

    answer: Answer


TracePart = EncodedPart | CoarsePart | RankedPart | EvidencePart | DonePart


@dataclass(frozen=True, slots=True, kw_only=True)
class PassagePage:
    """Passages, without their tokens; `next_page_token` gets the next page, "" on the last."""

    passages: tuple[Passage, ...]
    generation: str
    next_page_token: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchEffect:
    """What one training step on a passage did to the target."""

    passage_id: int
    probability_before: float
    probability_after: float
    loss_before: float
    loss_after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """Effects of the passages that there was time for."""

    effects: tuple[PatchEffect, ...]
    learning_rate: float
    provenance: Provenance
    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationInfo:
    """A generation that a gateway serves; see `trackstar.v1.Generation`."""

    name: str
    state: State
    checkpoint_digest: str
    config_digest: str
    num_passages: int
    dim: int
    mix: str
    mix_weight: float
    damping: float
    code_kind: str
    code_size: int
