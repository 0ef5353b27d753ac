"""Start the app as the README says, as a process of its own, and talk to it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUNDLED = ROOT / "assets" / "crosslmm-tiny"
FAKE = "tests.fake_engine:FakeEngine"
PATIENCE = 120.0  # seconds; only a broken app needs them


@dataclass
class App:
    url: str
    process: subprocess.Popen
    started: float  # time.monotonic() when the process was started
    answered: float  # ... and when the page was there

    def health(self) -> dict:
        return json.loads(fetch(self.url + "health"))

    def wait_for(self, *states: str) -> dict:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            health = self.health()
            if health["state"] in states:
                return health
            time.sleep(0.05)
        raise TimeoutError(f"the worker is {health['state']}, not {' or '.join(states)}")


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=PATIENCE) as reply:
        return reply.read()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running_app(
    *options: str,
    fake: bool = True,
    program: tuple[str, ...] = ("app.py",),
    told: Path | None = None,
    **environment: str,
) -> Iterator[App]:
    """The app with `options`; `told` is a file that gets what it prints to stderr."""
    port = free_port()
    environ = {**os.environ, **environment} | ({"CROSSLMM_ENGINE": FAKE} if fake else {})
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        stderr = stack.enter_context(told.open("ab")) if told is not None else None
        process = subprocess.Popen(
            [sys.executable, *program, "--port", str(port), *options],
            cwd=ROOT,
            env=environ,
            stderr=stderr,
        )
    try:
        url = f"http://127.0.0.1:{port}/"
        yield App(url, process, started, _wait_for_page(url, process))
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for_page(url: str, process: subprocess.Popen) -> float:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the app ended with code {process.returncode}")
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            fetch(url)
            return time.monotonic()
        time.sleep(0.02)
    raise TimeoutError(f"no page at {url} within {PATIENCE} s")
