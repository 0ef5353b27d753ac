"""Fetch the video behind a web address that a visitor pasted.

A child process does it, because what sites send is hostile input and takes as long as it likes:
the child can reach public web servers only (`app.addresses.Guard`), writes into one folder, and is
killed when the visitor cancels or a limit is reached. This side of it never touches the network.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import resource
import secrets
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from app.addresses import Guard
from app.logs import log
from app.settings import Settings, show_bytes
from model.types import InputError, StopCheck, Stopped

Progress = Callable[[int, int | None], None]  # bytes so far, bytes in all where known

Why = Literal[
    "address", "country", "damaged", "failed", "full", "gone", "large", "live", "login", "long",
    "nothing", "playlist", "private", "protected", "robot", "slow", "unreachable",
]  # fmt: skip

_INSTEAD = "please upload the file instead."
_SENTENCES: dict[Why, str] = {
    "address": "This address does not lead to a public website",
    "country": "The site does not show this video where this server stands",
    "damaged": "What the site sent is not a video that can be read",
    "failed": "The video could not be fetched",
    "full": "There is no room left on the disk for this video",
    "gone": "The site says that this video is not available",
    "large": "The video is larger than the {size} that are fetched",
    "live": "This is a live stream, and only finished videos can be fetched",
    "login": "The site shows this video only after signing in",
    "long": "The video is longer than the {minutes:.0f} minutes that are taken",
    "nothing": "No video was found at this address",
    "playlist": "This is the address of a list and not of one video",
    "private": "This video is private",
    "protected": "This video is protected against copying",
    "robot": "The site does not hand its videos to programs",
    "slow": "The site did not send the video within {seconds:.0f} seconds",
    "unreachable": "The site could not be reached",
}

VIDEO = "video"  # the child's name for the finished file
MAX_URL_CHARS = 2000
_LOOK_SECONDS = 0.1  # how often limits and cancelling are looked at
_MEMORY_BYTES = 1 << 30
_KEPT_VARIABLES = frozenset({"LANG", "LC_ALL", "PATH", "SSL_CERT_DIR", "SSL_CERT_FILE"})


@dataclass(frozen=True)
class Fetched:
    """A video that was fetched: a file with a name of ours, and the title the site gave it."""

    path: Path
    title: str


@dataclass(frozen=True)
class Order:
    """What the child is to fetch, into which folder, and how much of it at most."""

    url: str
    folder: Path
    max_bytes: int
    max_seconds: float
    max_duration: float
    guard: Guard


class Refused(Exception):
    """The video is not fetched; `why` chooses the sentence, `error` is a class for the log."""

    def __init__(self, why: Why, error: str = "") -> None:
        super().__init__(why)
        self.why: Why = why
        self.error = error


def fetch(
    url: str,
    folder: Path,
    settings: Settings,
    *,
    progress: Progress,
    stop: StopCheck,
    guard: Guard | None = None,
) -> Fetched:
    """Download the video at `url` into `folder`; blocks until it is there.

    Raises `InputError` with one sentence when that is not possible, and `Stopped` within a second
    of `stop()` turning true or of `folder` being deleted. Neither leaves a file behind. Another
    `guard` than the usual one is for tests.
    """
    url = check_url(url)
    try:
        work = Path(tempfile.mkdtemp(prefix="fetch-", dir=folder))
    except OSError as error:
        raise InputError(f"{_SENTENCES['full']}.") from error
    order = Order(
        url=url,
        folder=work,
        max_bytes=min(settings.max_fetch_bytes, settings.max_upload_bytes),
        max_seconds=settings.max_fetch_seconds,
        max_duration=settings.max_video_seconds,
        guard=guard or Guard(),
    )
    started = time.monotonic()
    try:
        title = _run(order, progress, stop)
        target = folder / f"{secrets.token_hex(8)}{_suffix(work / VIDEO)}"
        os.replace(work / VIDEO, target)
    except Refused as refusal:
        log("fetch_refused", why=refusal.why, error=refusal.error)
        raise InputError(_sentence(refusal.why, order)) from refusal
    finally:
        shutil.rmtree(work, ignore_errors=True)
    log("fetched", seconds=time.monotonic() - started, bytes=target.stat().st_size)
    return Fetched(target, title)


def check_url(text: str) -> str:
    """Return the web address in `text`; raises `InputError` when there is none to be fetched."""
    text = text.strip() if isinstance(text, str) else ""
    if not text:
        raise InputError("Paste the web address of a video first.")
    if not re.match(r"[a-z][a-z0-9+.-]*:", text, re.IGNORECASE):
        text = f"https://{text}"  # as browsers show addresses
    plain = len(text) <= MAX_URL_CHARS and text.isprintable() and not set(text) & set(' \\"<>^`')
    try:
        parts = urlsplit(text)
        whole = bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets or a port that make no sense
        plain = False
    if not plain or "__youtubedl_smuggle" in text:  # a way to give the downloader orders
        raise InputError(f"This is not a web address of a video; check it, or {_INSTEAD}")
    if parts.scheme not in {"http", "https"} or not whole:
        raise InputError(f"A web address begins with http:// or https://; check it, or {_INSTEAD}")
    if "@" in parts.netloc:
        raise InputError(f"A web address with a user name in it is not fetched; {_INSTEAD}")
    return text


def _sentence(why: Why, order: Order) -> str:
    told = _SENTENCES[why].format(
        size=show_bytes(order.max_bytes),
        minutes=order.max_duration / 60,
        seconds=order.max_seconds,
    )
    return f"{told}." if why == "full" else f"{told}; {_INSTEAD}"


def _run(order: Order, progress: Progress, stop: StopCheck) -> str:
    """Have a child fetch; returns the video's title. The child is gone when this returns."""
    context = multiprocessing.get_context("spawn")
    events, childs_end = context.Pipe(duplex=False)
    process = context.Process(
        target=_child, args=(order, childs_end), name="crosslmm-fetch", daemon=True
    )
    process.start()
    childs_end.close()
    deadline = time.monotonic() + order.max_seconds
    try:
        while True:
            if stop() or not order.folder.is_dir():
                raise Stopped
            if time.monotonic() > deadline:
                raise Refused("slow")
            if _size(order.folder) > order.max_bytes:
                raise Refused("large")
            if not events.poll(_LOOK_SECONDS):
                continue
            match json.loads(events.recv_bytes()):
                case {"done": int(done), "total": total}:
                    progress(done, total)
                case {"title": str(title)}:
                    return title
                case {"refused": why, "error": error}:
                    raise Refused(why, error)
    except (EOFError, OSError) as ended:  # it died, for example of its memory limit
        raise Refused("failed", "died") from ended
    finally:
        _end(process)
        events.close()


def _size(folder: Path) -> int:
    total = 0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # a fragment that was just taken in
            total += path.stat().st_size
    return total


def _end(process: multiprocessing.process.BaseProcess) -> None:
    with contextlib.suppress(ProcessLookupError):  # ended, or too young to have a group
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()
    process.close()


def _suffix(path: Path) -> str:
    """Name the container by how the file begins: what the site calls it does not count."""
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"\x1aE\xdf\xa3"):
        return ".webm" if b"webm" in start else ".mkv"
    return ".avi" if start.startswith(b"RIFF") else ".mp4"


def _child(order: Order, events: Connection) -> None:
    """Run in the child: shut every door, then fetch."""
    os.setsid()  # one group with the programs it starts; Ctrl-C in a terminal is the page's
    _limit(order)

    def send(**message: Any) -> None:
        events.send_bytes(json.dumps(message).encode())

    order.guard.install()
    try:
        parts = urlsplit(order.url)
        order.guard.look_up(parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme])
        # Only now and only here: it takes its time, and the page process has no use for it.
        from app.fetch_child import download

        send(title=download(order, lambda done, total: send(done=done, total=total)))
    except Exception as error:  # readers of many hundred sites, fed with hostile pages
        name = type(error.__cause__ or error).__name__
        send(refused=_why(error, order.guard), error=name)


def _why(error: Exception, guard: Guard) -> Why:
    if guard.refused or isinstance(error, socket.gaierror):
        return "address"
    if isinstance(error, MemoryError):
        return "large"
    return error.why if isinstance(error, Refused) else "failed"


def _limit(order: Order) -> None:
    """Take away what could be stolen or used up."""
    for name in set(os.environ) - _KEPT_VARIABLES:  # proxies, tokens, settings of yt-dlp
        del os.environ[name]
    os.environ |= {"HOME": str(order.folder), "YTDLP_NO_PLUGINS": "1"}
    os.chdir(order.folder)
    with open(os.devnull, "w") as nowhere:  # the log is not for what visitors paste
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    seconds = int(order.max_seconds) + 5
    for kind, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_DATA, _MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, order.max_bytes + 1),
        (resource.RLIMIT_NOFILE, 128),
    ):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    signal.alarm(seconds)  # the end, should the page process have died
