"""What an index folder offers: its generations, and the one that answers.

Reads index.json, generations/*/generation.json and active.json, and writes active.json alone; rows, codes and weights
are for others. It needs no torch. Nothing is remembered between calls but index.json, which never changes, so every
answer is as new as the folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from trackstar.audit_record import check_audited
from trackstar.blobs import Location, location
from trackstar.code_config import CodeConfig
from trackstar.codes import CodeSpec
from trackstar.errors import CorruptArtifact, Incompatible, NotFound, NotReady
from trackstar.storage import digest_of, publish_json, read_json

FORMAT = 2
State = Literal["building", "ready", "active", "retired"]
# The file that says so.
RETIRED = "retired.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationFacts:
    """One generation.

    checkpoint_digest: of the model. config_digest: of everything else that decides the scores: corpus, projection,
    correction, rows, mix and code. num_passages: N, purged ones included. num_codes: passages that the coarse index
    holds. dim: d of the rows. mix: "train", "task" or "none"; weight: the task's share; damping: relative to the mean
    eigenvalue. store: where codes are searched. Of a generation that is
    still being built only name, state, checkpoint_digest and dim are known; the rest is empty or 0, `spec` None.
    """

    name: str
    state: State
    checkpoint_digest: str
    config_digest: str
    num_passages: int
    num_codes: int
    dim: int
    mix: str
    weight: float
    damping: float
    spec: CodeSpec | None
    store: str


class Catalog:
    """Generations of an index folder.

    Raises:
        NotFound: the folder holds no index.
        Incompatible: it was written in another format.
        CorruptArtifact: index.json cannot be read.
    """

    def __init__(self, root: str | Location) -> None:
        self.root = location(root)
        if not (self.root / "index.json").is_file():
            raise NotFound(
                f"{str(root)!r} holds no index; build one with `trackstar index CORPUS --model DIR --out {root}`"
            )
        self.facts: dict[str, Any] = read_json(self.root / "index.json")
        found = self.facts.get("format") if isinstance(self.facts, dict) else None
        if found != FORMAT:
            raise Incompatible(
                f"{str(root)!r} has format {found!r}, this version reads format {FORMAT}; build it again"
            )

    def finished(self) -> list[str]:
        """Names of the finished generations that were not retired, sorted."""
        return sorted(self._complete() - {path.parent.name for path in self.generations.glob(f"*/{RETIRED}")})

    def names(self) -> list[str]:
        """Names of all generations, sorted; those that are being built too."""
        return sorted(path.name for path in self.generations.glob("*") if path.is_dir())

    def home(self, name: str, *, retired: bool = False) -> Location:
        """Folder of a finished generation.

        Args:
            name: the generation's.
            retired: whether one that was retired, and not collected yet, is meant too.

        Raises:
            NotFound: no finished generation of that name.
        """
        known = sorted(self._complete()) if retired else self.finished()
        if name not in known:
            raise NotFound(
                f"{str(self.root)!r} has no generation {name!r}; it has {', '.join(known) or 'none'}",
                kind="generation",
                name=name,
            )
        return self.generations / name

    def describe(self, name: str) -> GenerationFacts:
        """What is known of a generation.

        Raises:
            NotFound: no generation of that name.
            CorruptArtifact: its file cannot be read.
        """
        retired = (self.generations / name / RETIRED).is_file() if name in self.names() else False
        if not retired and name not in self.finished() and name in self.names():
            return self._unfinished(name)
        path = (self.generations / name if retired else self.home(name)) / "generation.json"
        content = read_json(path)
        try:
            code = CodeConfig(**content["code"])
            return GenerationFacts(
                name=name,
                state="retired" if retired else "active" if name == self.pointer() else "ready",
                checkpoint_digest=self.facts["model"]["digest"],
                config_digest=self._config_digest(content),
                num_passages=content["num_passages"],
                num_codes=content["num_codes"],
                dim=self.facts["dim"],
                mix=content["mix"]["kind"],
                weight=content["weight"],
                damping=content["mix"]["damping"],
                spec=code.spec(self.facts["dim"]),
                store=code.store,
            )
        except (KeyError, TypeError, ValidationError) as error:
            raise CorruptArtifact(f"{str(path)!r} is not what was written; give the index command again") from error

    def pointer(self) -> str | None:
        """Name in active.json; None while there is no such file."""
        try:
            content = read_json(self.root / "active.json")
        except NotFound:
            return None
        name = content.get("generation") if isinstance(content, dict) else None
        if not isinstance(name, str):
            raise CorruptArtifact(f"{str(self.root / 'active.json')!r} names no generation; activate one again")
        return name

    def active(self) -> str:
        """Name of the generation that answers.

        Raises:
            NotReady: none is active yet.
        """
        name = self.pointer()
        if name is None:
            raise NotReady(f"{str(self.root)!r} has no active generation yet; give the index command again")
        return name

    def activate(self, name: str) -> None:
        """Make a finished generation the one that answers; readers see either the old one or the new.

        Raises:
            NotFound: no generation of that name.
            NotReady: it is still being built, or was not audited, or failed its audit.
        """
        if name in self.names() and name not in self.finished():
            if (self.generations / name / RETIRED).is_file():
                raise NotReady(f"generation {name!r} was retired; bring it back first, if nothing was collected yet")
            raise NotReady(f"generation {name!r} is still being built; give the index command again to finish it")
        check_audited(self.home(name))
        publish_json(self.root / "active.json", {"generation": name})

    @property
    def generations(self) -> Location:
        """The folder of all generations."""
        return self.root / "generations"

    def _complete(self) -> set[str]:
        """Names of the finished generations, retired or not."""
        return {path.parent.name for path in self.generations.glob("*/generation.json")}

    def _config_digest(self, content: dict[str, Any]) -> str:
        # Where things lay when it was built decides nothing.
        index = {key: value for key, value in self.facts.items() if key not in ("model", "corpus", "max_batch_tokens")}
        return digest_of({"index": index, "corpus": self.facts["corpus"]["fingerprint"], "generation": content})

    def _unfinished(self, name: str) -> GenerationFacts:
        return GenerationFacts(
            name=name,
            state="building",
            checkpoint_digest=self.facts["model"]["digest"],
            config_digest="",
            num_passages=0,
            num_codes=0,
            dim=self.facts["dim"],
            mix="",
            weight=0.0,
            damping=0.0,
            spec=None,
            store="",
        )
