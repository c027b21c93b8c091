"""What processes use, as the kernel counts it (Linux)."""

import os
import platform
import subprocess
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the command's name; none when the process is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return text[text.rindex(")") + 2 :].split()


def tree(pid: int) -> list[int]:
    """Return a process and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := _stat(int(entry))):
            children.setdefault(int(fields[1]), []).append(int(entry))
    found = [pid]
    for parent in found:  # grows while it is gone through
        found += children.get(parent, [])
    return found


def cpu_seconds(pid: int) -> float:
    """Return user and system time of a process and its descendants."""
    return sum(int(fields[11]) + int(fields[12]) for one in tree(pid) if (fields := _stat(one))) / TICKS


def memory_bytes(pid: int) -> int:
    """Return the memory of a process and its descendants, shared pages divided by those who share them (PSS)."""
    total = 0
    for one in tree(pid):
        try:
            text = Path(f"/proc/{one}/smaps_rollup").read_text()
        except OSError:
            continue
        total += next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))
    return total


def description() -> dict[str, object]:
    """Return what somebody needs to know who compares figures."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "processor": next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
        "commit": _said("git", "rev-parse", "--short", "HEAD"),
        "nginx": _said("nginx", "-v"),
    }


def _said(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except OSError:
        return "none"
    return (result.stdout + result.stderr).strip()
