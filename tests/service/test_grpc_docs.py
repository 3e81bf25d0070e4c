"""The examples of docs/grpc.md and examples/ask_gateway.py, run against a gateway with reflection."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import sys
from pathlib import Path

from services.gateway.validate import LIMITS
from tests.service.honest import make_index, serving
from tests.service.honest_jobs import instant_jobs
from trackstar.rpc_errors import TABLE

_ROOT = Path(__file__).resolve().parents[2]
_PAGE = (_ROOT / "docs/grpc.md").read_text()
_SHELL = [block.replace("\\\n", " ") for block in re.findall(r"```sh\n(.*?)```", _PAGE, re.S)]
_CURLS = [command for command in _SHELL if command.startswith("buf curl")]


async def _ran(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()


def _objects(text: str) -> list[dict[str, object]]:
    """The JSON objects that follow one another."""
    decoder, found, start = json.JSONDecoder(), [], 0
    while start < len(text.rstrip()):
        value, end = decoder.raw_decode(text, start)
        found.append(value)
        start = end + len(text[end:]) - len(text[end:].lstrip())
    return found


def test_every_command_of_the_page_is_answered(tmp_path: Path) -> None:
    async def work() -> None:
        jobs = instant_jobs(tmp_path)
        async with serving(make_index(tmp_path, "alpha", active="alpha"), reflection=True, jobs=jobs) as gateway:
            assert len(_CURLS) >= 10
            for command in _CURLS:
                words = shlex.split(command.replace("localhost:50051", gateway.address))
                words[0] = str(Path(sys.executable).with_name("buf"))
                answers = _objects(await _ran(*words))
                assert answers, command
                assert all(answers), command
                if "TraceStream" in command:
                    assert [next(iter(part)) for part in answers][:3] == ["encoded", "coarse", "reranked"]
                elif "JobService/Watch" in command:
                    assert [part["job"]["state"] for part in answers] == ["JOB_STATE_SUCCEEDED"]  # type: ignore[index]
                elif command.rstrip().endswith("TraceService/Trace"):
                    assert answers[0].keys() >= {"target", "proponents", "opponents", "background", "provenance"}

        await jobs.close()

    asyncio.run(work())


def test_the_example_program_runs(tmp_path: Path) -> None:
    async def work() -> None:
        async with serving(make_index(tmp_path, "alpha", active="alpha")) as gateway:
            script = str(_ROOT / "examples/ask_gateway.py")
            out = await _ran(sys.executable, script, gateway.address, "The capital of France is", "Paris")
            assert "generation alpha" in out
            assert "the second page starts at rank 6" in out
            assert out.count("one step on passage") == 2

    asyncio.run(work())


def test_the_python_of_the_page_runs(tmp_path: Path) -> None:
    block = re.search(r"```python\n(.*?)```", _PAGE, re.S)
    assert block is not None

    async def work(code: str) -> None:
        async with serving(make_index(tmp_path, "alpha", active="alpha")) as gateway:
            out = await _ran(sys.executable, "-c", code.replace("localhost:50051", gateway.address))
            assert len(out.splitlines()) == 5

    asyncio.run(work(block.group(1)))


def test_limits_and_codes_of_the_page_are_those_of_the_code() -> None:
    limits = _PAGE[_PAGE.index("## Limits") :]
    for number in (LIMITS.k, LIMITS.candidates, LIMITS.verified_passages, LIMITS.new_tokens, LIMITS.value_bytes):
        assert f"{number:,}" in limits
    for size in (LIMITS.prompt_bytes, LIMITS.completion_bytes, LIMITS.target_bytes):
        assert f"{size >> 10} KiB" in limits
    for code, _ in TABLE.values():
        assert f"`{code.name}`" in _PAGE
