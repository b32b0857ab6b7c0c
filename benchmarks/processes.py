"""The memory and the processor time that processes use, from Linux's /proc."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

_INTERVAL_S = 0.05
_TICKS = os.sysconf("SC_CLK_TCK")


def forget_peak() -> None:
    """Begin a new peak of this process."""
    Path("/proc/self/clear_refs").write_text("5")


def peak(pid: int | str = "self") -> int:
    """Return the most bytes that a process has had in memory."""
    return _status(pid, "VmHWM")


def run(command: Sequence[str | Path]) -> int:
    """Run a command, and return the most bytes that it and its children had in memory; shared pages count for each."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        most = 0
        while process.poll() is None:
            most = max(most, sum(_status(each, "VmRSS") for each in _with_descendants(process.pid)))
            time.sleep(_INTERVAL_S)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return most


def cpu(pid: int) -> float:
    """Return the processor time of a process, its descendants and those that have ended, in seconds."""
    return sum(_cpu(each) for each in _with_descendants(pid))


def _with_descendants(pid: int) -> list[int]:
    try:
        listed = [each.read_text().split() for each in Path(f"/proc/{pid}/task").glob("*/children")]
    except (FileNotFoundError, ProcessLookupError):
        return []  # it has ended; likewise below
    return [pid, *(found for children in listed for child in children for found in _with_descendants(int(child)))]


def _cpu(pid: int) -> float:
    try:
        # The name, in parentheses, may contain spaces; then utime, stime, cutime and cstime are 14 to 17.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(map(int, fields[11:15])) / _TICKS


def _status(pid: int | str, name: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)
