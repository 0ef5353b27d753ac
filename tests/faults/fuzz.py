"""Mutated videos and mutated API payloads against the running app: `python -m tests.faults.fuzz`.

Passes when the page never dies, nothing takes longer than its deadline, the fixed question keeps
its answer, and no file is left behind. The same seed makes the same run.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from model.types import InputError, ReadBounds
from model.video_sandbox import decode_frames, probe
from tests.faults.conftest import Watched, watched_app
from tests.faults.summary import percentile, report
from tests.faults.visitor import META, Refused, Visitor, defaults
from tests.media import make_video

CODECS = {"h264": "libx264", "hevc": "libx265", "vp9": "libvpx-vp9", "av1": "libsvtav1"}
BOUNDS = ReadBounds(check_seconds=20, frame_seconds=20, read_seconds=40, memory=10**9)
SLACK_SECONDS = 20.0  # a busy machine's time to start and end a process
MUTATIONS = ("flip", "flip header", "cut", "splice", "fill", "insert", "numbers")


def mutate(data: bytes, others: list[bytes], rng: random.Random) -> tuple[str, bytes]:
    """One mutated copy, and the name of what was done to it."""
    kind, made = rng.choice(MUTATIONS), bytearray(data)
    size = len(made)
    if kind in ("flip", "flip header"):
        end = min(size, 2048) if kind == "flip header" else size
        for _ in range(rng.choice((1, 4, 32, 256))):
            made[rng.randrange(end)] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del made[rng.randrange(size) :]
    elif kind == "splice":  # the beginning of one file, the rest of another
        other, at = rng.choice(others), rng.randrange(64, 4096)
        made = bytearray(other[:at]) + made[at:]
    elif kind == "fill":
        at = rng.randrange(size)
        length = min(size - at, rng.choice((4, 64, 4096)))
        made[at : at + length] = bytes([rng.choice((0, 0xFF, 0x7F))]) * length
    elif kind == "insert":
        at = rng.randrange(size)
        made[at:at] = rng.randbytes(rng.choice((1, 16, 1024)))
    else:  # sizes, counts and times in a container's tables
        boxes = [b"stsz", b"stts", b"stco", b"tkhd", b"mvhd", b"mdhd", b"ctts", b"stsd", b"elst"]
        at = made.find(rng.choice(boxes))
        at = rng.randrange(size - 4) if at < 0 else min(size - 4, at + 4 * rng.randrange(1, 12))
        number = rng.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, rng.randrange(2**32)))
        made[at : at + 4] = number.to_bytes(4, "big")
    return kind, bytes(made)


def read(path: Path) -> str:
    """Check and decode one file as the worker does; returns what came of it."""
    try:
        info = probe(path, bounds=BOUNDS)
        step = info.duration / 4
        with decode_frames(path, [n * step for n in range(4)], info=info, bounds=BOUNDS) as frames:
            return "frames" if list(frames) else "nothing"
    except InputError as error:
        text = str(error)
        assert text.endswith(".") and text.isprintable() and str(path) not in text, text
        crashed = "crashed" in text, "longer than" in text, "more memory" in text
        return dict(zip(crashed, ("crashed", "deadline", "memory"), strict=True)).get(
            True, "refused"
        )


def videos(folder: Path) -> list[bytes]:
    made = []
    for name, encoder in CODECS.items():
        for suffix in ("mp4", "mkv"):
            path = folder / f"{name}.{suffix}"
            make_video(path, codec=encoder, duration=2, fps=10, gop=10, size=(96, 64))
            made.append(path.read_bytes())
    return made


def fuzz_videos(count: int, seed: int, folder: Path, app: Watched, wrong: list[str]) -> dict:
    """Every file goes through check and decoding, every tenth through the app as well."""
    rng, sources = random.Random(seed), videos(folder)
    outcomes: collections.Counter[str] = collections.Counter()
    spent: list[float] = []

    def one(number: int, kind: str, content: bytes) -> None:
        path = folder / f"mutated{number}.mp4"
        path.write_bytes(content)
        started = time.monotonic()
        try:
            came = read(path)
        except Exception as error:  # whatever it is, it is a finding
            came = "wrong"
            wrong.append(f"video {number} ({kind}): {type(error).__name__}: {error}")
        spent.append(time.monotonic() - started)
        if spent[-1] > BOUNDS.check_seconds + BOUNDS.read_seconds + SLACK_SECONDS:
            wrong.append(f"video {number} ({kind}) took {spent[-1]:.0f} s")
        outcomes[came] += 1
        if number % 10 == 0:
            through_app(number, path)
        path.unlink()

    def through_app(number: int, path: Path) -> None:
        visitor = Visitor(app.url)
        try:
            visitor.add(path)
            visitor.ask("What?")
            outcomes["app took it"] += 1
        except Refused as refused:
            outcomes["app refused it"] += 1
            if str(refused) == "None":
                wrong.append(f"video {number}: the app gave no sentence")

    with ThreadPoolExecutor(2) as pool:
        made = [(number, *mutate(rng.choice(sources), sources, rng)) for number in range(count)]
        list(pool.map(lambda one_made: one(*one_made), made))
    return {
        "videos": count,
        "outcomes": dict(outcomes),
        "seconds_p95": percentile(spent, 0.95),
        "seconds_most": percentile(spent, 1.0),
    }


def payloads(
    count: int, rng: random.Random, more: dict[str, tuple[Any, ...]]
) -> Iterator[tuple[str, bytes]]:
    """Pairs of a path and a body; `more` follows the first value of an endpoint."""
    values: list[Any] = [
        None, True, -1, 2**63, 1e308, "", " ", "\0", "x" * 3000, "<script>", "../../etc/passwd",
        [], {}, [[]], {"path": "/etc/passwd", "meta": META}, {"path": None, "meta": META},
        {"path": "http://169.254.169.254/", "meta": META}, {"__type__": "update", "value": "x"},
        {"path": "/proc/self/environ"}, ["a"] * 50, {"a": {"b": {"c": [1, 2, {"d": None}]}}},
        "http://[::ffff:127.0.0.1]/", "file:///etc/passwd", "\ud83d", "NaN", {"$ref": "#"},
    ]  # fmt: skip
    names = ["ask", "add_video", "add_video_url", "add_sample", "stop", "page_ask", "nothing"]
    for _ in range(count):
        name = rng.choice(names)
        data: Any = [rng.choice(values) for _ in range(rng.choice((0, 1, 1, 1, 2, 9)))]
        if rng.random() < 0.6:  # as many values as the endpoint wants
            data = [rng.choice(values), *more.get(name, ())]
            data[rng.randrange(len(data))] = rng.choice(values)
        key = rng.randbytes(6).hex()
        body: Any = {"data": data, "session_hash": rng.choice([key, key, key, None, 5])}
        if rng.random() < 0.2:
            body[rng.choice(("fn_index", "event_id", "event_data", "trigger_id"))] = rng.choice(
                values
            )
        text = json.dumps(body).encode()
        if rng.random() < 0.2:
            broken = bytearray(text)
            for _ in range(rng.choice((1, 5))):
                broken[rng.randrange(len(broken))] = rng.randrange(256)
            text = bytes(broken)
        where = rng.choice((f"call/{name}", f"call/{name}", f"run/{name}", "queue/join"))
        yield f"/gradio_api/{where}", text


def fuzz_payloads(count: int, seed: int, app: Watched, wrong: list[str]) -> dict:
    statuses: collections.Counter[str] = collections.Counter()
    spent: list[float] = []
    more = defaults(Visitor(app.url).address)
    for number, (path, body) in enumerate(payloads(count, random.Random(seed), more)):
        visitor, started = Visitor(app.url, patience=60), time.monotonic()
        try:
            status, told = visitor.post(path, body)
        except (OSError, ValueError) as error:
            wrong.append(f"payload {number} to {path}: {type(error).__name__}")
            continue
        statuses[str(status)] += 1
        if status == 200 and "/call/" in path:
            with contextlib.suppress(OSError, ValueError, KeyError):
                event = json.loads(told)["event_id"]
                for kind, _ in visitor.listen(path.rsplit("/", 1)[1], event):
                    statuses[kind] += kind in ("complete", "error")
        spent.append(time.monotonic() - started)
        if b"root:" in told:
            wrong.append(f"payload {number} to {path}: a file of the machine came back")
        if app.app.process.poll() is not None:
            wrong.append(f"payload {number} to {path}: the page is gone")
            break
    return {"payloads": count, "replies": dict(statuses), "seconds_p95": percentile(spent, 0.95)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=int, default=2000)
    parser.add_argument("--payloads", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        film = folder / "fixed.mp4"
        make_video(film, duration=4, size=(160, 96))
        limits = ("--session-grace-seconds", "5", "--session-idle-seconds", "20")
        with watched_app(
            folder, film, *limits, "--max-history-turns", "0", "--upload-age-seconds", "20"
        ) as app:
            started = time.monotonic()
            figures = {
                "of_videos": fuzz_videos(args.videos, args.seed, folder, app, wrong),
                "of_payloads": fuzz_payloads(args.payloads, args.seed, app, wrong),
            }
            figures["seconds"] = round(time.monotonic() - started)
            wrong += after(app, film)
    return report("fuzz", wrong, seed=args.seed, **figures)


def after(app: Watched, film: Path) -> list[str]:
    """What is wrong once all visitors of the run are forgotten."""
    deadline, left = time.monotonic() + 120, [Path()]
    while left and time.monotonic() < deadline:
        time.sleep(2)
        left = app.files()
    wrong = [f"left behind: {path.name}" for path in left]
    app.fixed = Visitor(app.url)
    app.fixed.add(film)
    try:
        app.check()
    except AssertionError as error:
        wrong.append(f"afterwards: {error}")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
