"""CrossLMM Chat: `python app.py`, then open the address it prints. `--help` lists all settings."""

from __future__ import annotations

import sys


def main() -> int:
    """Serve the page."""
    # Imported here, because the worker's child process runs this file too.
    from app.run import run

    return run()


if __name__ == "__main__":
    sys.exit(main())
