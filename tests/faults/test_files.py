"""Rows 1 to 7, 11 to 14 and 23: files that come in, through the running app."""

from __future__ import annotations

import http.server
import itertools
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import decoder
from tests.faults.conftest import UPLOAD_LIMIT, Watched, until
from tests.faults.visitor import META, Refused, form


@pytest.mark.parametrize("told", [True, False], ids=["declared", "chunked"])
def test_an_upload_over_the_limit_leaves_nothing(told: bool, app: Watched) -> None:
    """Row 1."""
    before, sent = app.files(), 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        for _ in itertools.repeat(None, 2000):
            sent += 1 << 16
            yield bytes(1 << 16)

    content = bytes(UPLOAD_LIMIT + 100_000) if told else endless()
    status, said = app.visitor().send_file(content, "big.mp4")
    assert status == 413 or (status == 0 and not told)
    assert not said or b"2 MB" in said or b"2000000 bytes" in said
    assert told or sent < 20 * UPLOAD_LIMIT  # of 65; it was not read to its end
    until(lambda: app.files() == before)


def test_an_upload_that_breaks_off_is_deleted(app: Watched) -> None:
    """Row 1: half a file, then nobody."""
    before = app.files()
    head, _ = form("half.mp4")
    host, port = app.visitor().address.split(":")
    with socket.create_connection((host, int(port))) as link:
        link.sendall(
            b"POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n"
            b"Content-Type: multipart/form-data; boundary=limit\r\n\r\n" + head + bytes(100_000)
        )
        until(lambda: len(app.files()) > len(before))
    until(lambda: app.files() == before)


@pytest.mark.parametrize(
    ("kind", "said"), [("empty", "empty"), ("text", "not a video"), ("truncated", "cut off")]
)
def test_what_is_no_video_is_said(
    kind: str, said: str, app: Watched, videos: dict[str, Path]
) -> None:
    """Rows 2 and 3."""
    with pytest.raises(Refused, match=said):
        app.visitor().add(videos[kind])


@pytest.mark.parametrize("how", ["hang", "segfault"])
def test_a_decoder_that_hangs_or_crashes_costs_one_upload(
    how: str, app: Watched, videos: dict[str, Path], tmp_path: Path
) -> None:
    """Rows 5 and 6."""
    visitor = app.visitor()
    path = decoder.mark(videos["h264"], tmp_path / "bad.mp4", "check", how)
    with pytest.raises(Refused, match="longer than 6 s" if how == "hang" else "crashed"):
        visitor.add(path)
    assert visitor.add(videos["h264"])["codec"] == "h264"
    assert visitor.ask("And now?")["answer"].startswith("You asked: And now?")


class _Inner(http.server.BaseHTTPRequestHandler):
    """An address that nobody may reach."""

    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(404)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


def test_a_file_handed_over_as_an_address_is_not_fetched(app: Watched) -> None:
    """Row 11."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Inner) as inner:
        threading.Thread(target=inner.serve_forever, args=(0.05,), daemon=True).start()
        port = inner.server_port
        for address in (
            f"http://127.0.0.1:{port}/a.mp4",
            f"http://localhost:{port}/a.mp4",
            f"http://[::1]:{port}/a.mp4",
            f"http://0x7f000001:{port}/a.mp4",
            "http://169.254.169.254/latest/meta-data/",
            "file:///etc/passwd",
        ):
            for more in ({"meta": META}, {}, {"meta": META, "is_stream": True}):
                with pytest.raises(Refused):
                    app.visitor().call("add_video", {"path": address, "url": address, **more})
            with pytest.raises(Refused, match="upload the file instead|Paste"):
                app.visitor().call("add_video_url", address)
        inner.shutdown()
    assert _Inner.asked == []


def test_paths_outside_the_uploads_are_refused(app: Watched, videos: dict[str, Path]) -> None:
    """Row 12."""
    visitor = app.visitor()
    mine = visitor.upload(videos["h264"])
    link = Path(mine).with_name("link.mp4")
    link.symlink_to(videos["av1"])
    for path in (
        "/etc/passwd",
        "/proc/self/environ",
        "/proc/self/fd/0",
        "app.py",
        "../app.py",
        str(Path(mine).parent / ".." / ".." / ".." / "told.log"),
        str(videos["h264"]),
        str(link),
        mine + "\0.mp4",
        "",
    ):
        for more in ({"meta": META}, {}, {"meta": META, "is_stream": True}):
            with pytest.raises(Refused):
                visitor.call("add_video", {"path": path, **more})
        status, _, body = visitor.request("GET", "/gradio_api/file=" + path)
        assert status in (307, 400, 403, 404, 405) or path == str(link), (path, status, body[:80])
    link.unlink()


def test_one_visitor_cannot_reach_anothers(app: Watched, videos: dict[str, Path]) -> None:
    """Row 13."""
    one, other = app.visitor(), app.visitor()
    one.add(videos["h264"])
    event = one.begin("ask", "slow secret")
    assert next(one.listen("ask", event))
    with pytest.raises(Refused, match="Choose a sample"):
        other.ask("What does the other one see?")
    assert other.stop() is False
    kept = [path for path in app.folder.rglob("*.mp4") if "uploads" not in path.parts]
    for path in kept:
        with pytest.raises(Refused):
            other.call("add_video", {"path": str(path), "meta": META})
        status, _, _ = other.request("GET", f"/gradio_api/file={path}")
        assert status in (403, 404)
        status, _, _ = other.request("GET", f"/media/{path.name}")
        assert status == 404
    assert one.stop() is True


@pytest.mark.parametrize(
    "name",
    [
        "<img src=x onerror=alert(1)>.mp4",
        "../../../../evil.mp4",
        "page.html",
        "picture.svg",
        "x" * 300 + ".mp4",
        "a\u202egpj.exe",
        "con\r\nX-Evil: 1.mp4",
        "",
    ],
)
def test_file_names_are_ours(name: str, app: Watched, videos: dict[str, Path]) -> None:
    """Row 14."""
    visitor = app.visitor()
    try:
        path = Path(visitor.upload(videos["h264"], name))
    except Refused:
        return
    assert path.is_relative_to(app.folder)
    status, headers, _ = visitor.request("GET", f"/gradio_api/file={path}")
    if status == 200 and path.suffix in (".html", ".svg"):
        assert "attachment" in headers["content-disposition"]
    added = visitor.call("add_video", {"path": str(path), "meta": META})
    assert len(added["title"]) <= 80 and added["title"].isprintable()
    kept = [one for one in app.folder.rglob("*.*") if "uploads" not in one.parts and one.is_file()]
    assert all(one.suffix in (".mp4", ".webm") and len(one.stem) == 16 for one in kept)
