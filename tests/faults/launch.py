"""The app as it is, but videos are read by `tests.faults.decoder`, and downloads may reach the one
address that FAULT_SITE names (host:port)."""

from __future__ import annotations

import functools
import os

from tests.faults import decoder


def main() -> None:
    from app import fetch, run

    decoder.use()
    if site := os.environ.get("FAULT_SITE"):
        host, port = site.rsplit(":", 1)
        fetch.Guard = functools.partial(fetch.Guard, allow=(host, int(port)))
    raise SystemExit(run.run())


if __name__ == "__main__":
    main()
