"""Structured log lines: `event=job_done job=3f2a seconds=1.2`.

They never hold what a visitor wrote or shows.
"""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger("crosslmm")


def setup(level: str) -> None:
    """Send this program's lines to stderr; other libraries stay as they are."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(level.upper())


def log(event: str, level: int = logging.INFO, **fields: Any) -> None:
    """Write one line. `fields` hold ids, counts, times and names of error classes."""
    shown = " ".join(f"{name}={_value(value)}" for name, value in fields.items())
    logger.log(level, "event=%s %s", event, shown)


def _value(value: Any) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    plain = text.replace("\n", " ").replace('"', "'")
    return f'"{plain}"' if " " in plain else plain
