"""What the long runs print at their end, and how they judge it."""

from __future__ import annotations

import datetime
import json
import platform
from typing import Any

import numpy as np
import psutil


def machine() -> dict[str, Any]:
    """The kind of machine, so that figures can be compared."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {psutil.cpu_count()} CPUs, "
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "load_average": round(psutil.getloadavg()[0], 1),
    }


def percentile(values: list[float], share: float) -> float | None:
    return round(float(np.quantile(values, share)), 3) if values else None


def slope(times: list[float], values: list[float]) -> float | None:
    """Least squares, per second; None when there is too little to fit."""
    if len(times) < 3:
        return None
    return float(np.polyfit(times, values, 1)[0])


def report(name: str, wrong: list[str], **figures: Any) -> int:
    """Print one JSON object; returns the exit code."""
    told = {"run": name, **machine(), **figures, "wrong": wrong[:20], "passed": not wrong}
    print(json.dumps(told, indent=1))
    return int(bool(wrong))
