"""Memory and processor time of a process, as Linux tells them."""

from __future__ import annotations

import os
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def resident_bytes(process_id: int | None = None) -> int:
    """Resident memory now; of this process if none is named."""
    return _status(process_id, "VmRSS")


def peak_bytes(process_id: int | None = None) -> int:
    """The highest resident memory so far, or since `forget_peak`."""
    return _status(process_id, "VmHWM")


def forget_peak() -> None:
    """Let the peak of this process begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def cpu_seconds(process_id: int) -> float:
    """Processor time of a process and its threads, in hundredths of a second."""
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _status(process_id: int | None, name: str) -> int:
    lines = Path(f"/proc/{process_id or 'self'}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))
