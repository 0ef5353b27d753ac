"""Of Python and of what is installed, for `/health` and the run card."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "torch", "transformers", "gradio", "bitsandbytes", "accelerate", "flash-attn", "av", "decord",
    "yt-dlp", "numpy", "pillow",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Versions by name, without importing any of the packages."""
    return dict(_found())


@cache
def _found() -> tuple[tuple[str, str], ...]:
    found = [("python", platform.python_version())]
    for name in PACKAGES:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:  # optional, like flash-attn
            continue
    return tuple(found)
