"""Start the worker and the page, and end them together."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NoReturn

from app.logs import log, setup
from app.sessions import Sessions
from app.settings import Settings
from app.sources import list_samples
from app.worker import Worker
from app.zero_worker import NEEDS_SPACES, ZeroWorker, wanted

NO_TUNNEL = (
    "No public link: the tunnel for --share could not be made. This machine must reach "
    "api.gradio.app and, the first time, cdn-media.huggingface.co. The page goes on locally."
)
NO_MCP = "--mcp needs the MCP package; install it with: pip install 'gradio[mcp]'"

_FAREWELL_SECONDS = 0.5


def run(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal ends it, then end the process; an exit code if it cannot begin."""
    settings = Settings.parse(argv)
    setup(settings.log_level)
    if settings.mcp and find_spec("mcp") is None:
        print(NO_MCP, file=sys.stderr)
        return 2
    if settings.worker == "zerogpu" and find_spec("spaces") is None:
        print(NEEDS_SPACES, file=sys.stderr)
        return 2
    # A resident worker loads the model while the page starts; on ZeroGPU it must be there before.
    worker = ZeroWorker(settings) if wanted(settings) else Worker(settings)
    sessions = Sessions(settings, worker.forget)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    try:
        code = _serve(settings, worker, sessions, ended)
    finally:
        worker.close()
        sessions.close()
    _leave(code)


def _leave(code: int) -> NoReturn:
    """End now: threads that still wait for a download or a check would hold the end up."""
    deadline = time.monotonic() + _FAREWELL_SECONDS
    # Downloads end with the folder they write into.
    while (children := multiprocessing.active_children()) and time.monotonic() < deadline:
        time.sleep(0.02)
    for child in children:
        child.kill()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _serve(
    settings: Settings, worker: Worker | ZeroWorker, sessions: Sessions, ended: threading.Event
) -> int:
    # Gradio reads these when it is imported, and keeps uploads there.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(sessions.disk.uploads)
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
    log("page_closing")
    logging.getLogger("uvicorn.error").disabled = True  # it would list what is cut off
    worker.close()  # answers under way end with a sentence ...
    time.sleep(_FAREWELL_SECONDS)  # ... which still reaches their visitors
    if demo.server is not None:
        demo.server.force_exit = True  # pages that stay open are not waited for
    demo.close(verbose=False)
    return 0
