"""What `/health` tells supervisors: the worker's state and both processes' use of the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from app.versions import versions
from app.worker import Worker


def report(worker: Worker, visitors: int, disk_bytes: int) -> dict[str, Any]:
    """Plain data without names, questions or files of visitors."""
    status, pid = worker.status(), worker.worker_pid()
    model = status.model
    return {
        "state": status.state,
        "waiting": status.waiting,
        "restarts": status.restarts,
        "error": status.error,
        "model": model and {"name": model.name, "device": model.device},
        "visitors": visitors,
        "disk_bytes": disk_bytes,
        "page": usage("self"),
        "worker": usage(str(pid)) if pid is not None else None,
        "versions": versions(),
    }


def usage(pid: str) -> dict[str, int] | None:
    """Resident memory in bytes, threads and open descriptors; None when the process is gone."""
    folder = Path("/proc", pid)
    try:
        lines = (folder / "status").read_text().splitlines()
        descriptors = sum(1 for _ in (folder / "fd").iterdir())
    except OSError:
        return None
    told = dict(line.split(":", 1) for line in lines if ":" in line)
    memory = int(told.get("VmRSS", "0").split()[0]) * 1024
    return {
        "memory_bytes": memory,
        "threads": int(told.get("Threads", "0")),
        "descriptors": descriptors,
    }
