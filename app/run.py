"""Start the worker and the page, and end them together."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Sequence
from importlib.util import find_spec

from app.logs import log, setup
from app.sessions import Sessions
from app.settings import Settings
from app.sources import list_samples
from app.worker import Worker

NO_TUNNEL = (
    "No public link: the tunnel for --share could not be made. This machine must reach "
    "api.gradio.app and, the first time, cdn-media.huggingface.co. The page goes on locally."
)
NO_MCP = "--mcp needs the MCP package; install it with: pip install 'gradio[mcp]'"


def run(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal ends it; returns the exit code."""
    settings = Settings.parse(argv)
    setup(settings.log_level)
    if settings.mcp and find_spec("mcp") is None:
        print(NO_MCP, file=sys.stderr)
        return 2
    worker = Worker(settings)  # loads the model while the page starts
    sessions = Sessions(settings, worker.forget)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    try:
        return _serve(settings, worker, sessions, ended)
    finally:
        worker.close()
        sessions.close()


def _serve(settings: Settings, worker: Worker, sessions: Sessions, ended: threading.Event) -> int:
    # Gradio reads these when it is imported, and keeps uploads there.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(sessions.root / "uploads")
    # Gradio asks its own address whether it is there; no proxy can answer that.
    unproxied = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    os.environ["no_proxy"] = ",".join(filter(None, [unproxied, "127.0.0.1", "localhost"]))
    gc.disable()  # importing Gradio makes many objects and drops none: saves 0.3 s
    from app.ui import build, launch_options

    demo = build(settings, worker, sessions, list_samples())
    try:
        _, local, public = demo.launch(**launch_options(settings, worker, sessions))
    except OSError as error:
        print(f"The page cannot be served: {error}", file=sys.stderr)
        return 1
    gc.enable()
    gc.freeze()  # and later collections need not look at them
    print(f"CrossLMM Chat is at {local}", flush=True)
    if public:
        who = "whoever logs in" if settings.auth else "everybody who has the link (see --auth)"
        print(f"and for {who} at {public}", flush=True)
    elif settings.share:
        print(NO_TUNNEL, file=sys.stderr, flush=True)
    log("page_ready", port=demo.server_port)
    ended.wait()
    demo.close(verbose=False)
    return 0
