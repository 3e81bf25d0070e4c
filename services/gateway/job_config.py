"""The configuration of a job: the operator's, changed in what a request may change.

It is that of the reindex command: `index` is where the index is, and `build` what `trackstar index --config` takes.
What a request appends follows everything that was appended before, by the operator or by jobs, because the parts of an
index stay in their order; files that are in it already are not appended again.

Contract: everything but the keys of `validate_jobs` stays as the operator wrote it: models, folders, devices and code
that is run are never a caller's. Files that a request names lie below a folder or URL that the operator allows, as
they are spelt; what links inside those folders lead to is the operator's matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trackstar.blobs import Location
from trackstar.errors import InvalidRequest, NotFound, TrackstarError
from trackstar.runs import planned_corpora


class JobConfiguration:
    """Makes configurations of jobs.

    Args:
        base: the operator's file; it is read for every job, so that it may change.
        allowed_paths: folders and URLs below which requests may name files.
        root: the index.
    """

    def __init__(self, base: Path, allowed_paths: Sequence[str], root: Location) -> None:
        self._base = base
        self._root = root
        self._allowed = tuple(path.rstrip("/") for path in allowed_paths)

    def check(self) -> None:
        """Read the operator's file.

        Raises:
            NotFound: there is none.
            InvalidRequest: it is not YAML, or says not what to build.
        """
        self._read()

    def derive(self, spec: Mapping[str, Any]) -> str:
        """The configuration of a job as YAML.

        Args:
            spec: as in `validate_jobs`.

        Raises:
            InvalidRequest: a path that is not allowed.
            TrackstarError: the operator's file cannot be used now.
        """
        for path in spec.get("append_paths", ()):
            self._check_path("spec.append_paths", path)
        if "task_queries" in spec:
            self._check_path("spec.task_queries", spec["task_queries"])
        try:
            derived = self._read()
        except (NotFound, InvalidRequest) as error:
            # Not the caller's fault.
            raise TrackstarError(f"no job can be made now: {error}") from error
        derived.setdefault("index", str(self._root))
        build = derived["build"]
        for key in ("mix", "code"):
            if key in spec:
                build[key] = _over(build.get(key), spec[key])
        if "task_queries" in spec:
            build["task_queries"] = spec["task_queries"]
        if parts := self._appended(build, spec.get("append_paths", ())):
            build["append"] = parts
        # Whatever the operator wrote: a request decides these by leaving them out, too.
        build |= {key: spec.get(key, False) for key in ("refit", "purge", "activate")}
        return yaml.safe_dump(derived, sort_keys=True, allow_unicode=True)

    def _appended(self, build: Mapping[str, Any], paths: Sequence[str]) -> list[dict[str, Any]]:
        """The corpora of all parts but the first."""
        corpus = build["corpus"]
        parts = [dict(part) for part in build.get("append") or ()]
        for planned in planned_corpora(self._root / "rows")[1 + len(parts) :]:
            planned.pop("fingerprint", None)
            parts.append(planned)
        known = {path for part in (corpus, *parts) for path in part["paths"]}
        if new := [path for path in paths if path not in known]:
            parts.append({**corpus, "paths": new})
        return parts

    def _check_path(self, field: str, path: str) -> None:
        if not self._allowed:
            raise InvalidRequest(f"{field}: this gateway lets no request name files", field=field)
        # `::` chains file systems in fsspec: what follows it is another place.
        plain = "::" not in path and "\\" not in path and ".." not in path.split("/")
        if not plain or not any(path == allowed or path.startswith(f"{allowed}/") for allowed in self._allowed):
            raise InvalidRequest(f"{field}: {path[:200]!r} is not below a folder that may be named", field=field)

    def _read(self) -> dict[str, Any]:
        try:
            content = yaml.safe_load(self._base.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise NotFound(f"there is no reindex configuration {str(self._base)!r}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"{str(self._base)!r} is not YAML") from error
        build = content.get("build") if isinstance(content, dict) else None
        corpora = [build.get("corpus"), *(build.get("append") or ())] if isinstance(build, dict) else [None]
        if not all(isinstance(corpus, dict) and isinstance(corpus.get("paths"), list) for corpus in corpora):
            raise InvalidRequest(f"{str(self._base)!r} must say what to build: build.corpus.paths and more")
        assert isinstance(content, dict), "a build is in a mapping"
        return content


def _over(base: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes over the operator's values. A size belongs to its kind and does not outlive it."""
    kept = dict(base) if isinstance(base, dict) else {}
    if "kind" in changes and changes["kind"] != kept.get("kind"):
        kept.pop("size", None)
    return {**kept, **changes}
