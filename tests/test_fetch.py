from __future__ import annotations

import contextlib
import http.server
import itertools
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import av
import pytest

from app.addresses import Guard
from app.fetch import check_url, fetch
from app.settings import Settings
from app.sources import probe
from model.types import InputError, Stopped
from tests.app_server import ROOT
from tests.media import make_video

SETTINGS = Settings()
ALL_PORTS = range(1, 65536)  # so that it is the address that is refused, and not its port
PATIENCE = 60.0  # seconds; only a broken fetch needs them
Page = tuple[int, dict[str, str], bytes]


@dataclass
class Site:
    """A web server of the attacker's (or of an honest site's) on this machine."""

    port: int
    pages: dict[str, Page | Callable[[http.server.BaseHTTPRequestHandler], None]]
    asked: list[str] = field(default_factory=list)

    @property
    def guard(self) -> Guard:
        return Guard(allow=("127.0.0.1", self.port), ports=ALL_PORTS)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def show(self, path: str, kind: str, body: bytes | str) -> str:
        body = body.encode() if isinstance(body, str) else body
        self.pages[path] = (200, {"Content-Type": kind}, body)
        return self.url(path)

    def redirect(self, path: str, target: str, status: int = 302) -> str:
        self.pages[path] = (status, {"Location": target}, b"")
        return self.url(path)


@pytest.fixture
def site() -> Iterator[Site]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            site.asked.append(path)
            page = site.pages.get(path, (404, {}, b""))
            with contextlib.suppress(ConnectionError):
                if callable(page):
                    page(self)
                    return
                status, headers, body = page
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    site = Site(server.server_port, {})
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield site
    server.shutdown()
    server.server_close()


@pytest.fixture
def forbidden() -> Iterator[int]:
    """The port of a listener on all of this machine's addresses; nobody may connect to it."""
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
        yield listener.getsockname()[1]
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


def never() -> bool:
    return False


def refused(url: str, folder: Path, guard: Guard | None = None, **limits: float) -> str:
    """Fetch what must be refused; returns the sentence."""
    with pytest.raises(InputError) as error:
        fetch(url, folder, Settings(**limits), progress=lambda *_: None, stop=never, guard=guard)
    assert list(folder.iterdir()) == []
    sentence = str(error.value)
    assert sentence.endswith("please upload the file instead.")
    assert "\n" not in sentence
    return sentence


def fetched(url: str, folder: Path, site: Site) -> Path:
    seen: list[tuple[int, int | None]] = []
    video = fetch(
        url,
        folder,
        SETTINGS,
        progress=lambda done, total: seen.append((done, total)),
        stop=never,
        guard=site.guard,
    )
    assert list(folder.iterdir()) == [video.path]
    assert seen and seen[-1][0] > 0
    assert probe(video.path, SETTINGS).duration == pytest.approx(6, abs=0.3)
    return video.path


# What works.


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("h264", "/holiday.mp4", "video/mp4"),
        ("av1", "/film.webm", "video/webm"),
        ("h264", "/download", "application/octet-stream"),
    ],
)
def test_a_direct_link(
    kind: str, name: str, said: str, site: Site, videos: dict[str, Path], tmp_path: Path
) -> None:
    url = site.show(name, said, videos[kind].read_bytes())
    path = fetched(site.redirect("/short", url), tmp_path, site)
    assert path.suffix == (".webm" if kind == "av1" else ".mp4")
    assert path.stem not in name
    assert path.read_bytes() == videos[kind].read_bytes()


def test_an_mkv_with_a_lying_name(site: Site, tmp_path: Path) -> None:
    folder = tmp_path / "visitor"
    folder.mkdir()
    make_video(tmp_path / "film.mkv", codec="libx264", duration=6)
    url = site.show("/..%2f..%2fpage.html", "video/mp4", (tmp_path / "film.mkv").read_bytes())
    assert fetched(url, folder, site).suffix == ".mkv"


def test_a_page_that_names_its_video(site: Site, videos: dict[str, Path], tmp_path: Path) -> None:
    url = site.show("/holiday.mp4", "video/mp4", videos["h264"].read_bytes())
    page = f'<html><title>Trip</title><body><video src="{url}"></video></body></html>'
    assert fetched(site.show("/page", "text/html", page), tmp_path, site).suffix == ".mp4"


def test_hls_becomes_an_mp4(site: Site, videos: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "visitor"
    folder.mkdir()
    stream = remuxed(videos["h264"], tmp_path / "film.ts", "mpegts")
    half = len(stream) // 376 * 188
    site.show("/a.ts", "video/mp2t", stream[:half])
    site.show("/b.ts", "video/mp2t", stream[half:])
    url = site.show("/film.m3u8", "application/x-mpegurl", playlist("a.ts", "b.ts"))
    master = "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1,RESOLUTION=320x240\n" + url + "\n"
    url = site.show("/master.m3u8", "application/vnd.apple.mpegurl", master)
    assert fetched(url, folder, site).suffix == ".mp4"


def test_dash(site: Site, videos: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "visitor"
    folder.mkdir()
    movie = remuxed(
        videos["h264"], tmp_path / "film.mp4", "mp4", movflags="frag_keyframe+empty_moov"
    )
    half = len(movie) // 2
    site.show("/a.m4s", "video/mp4", movie[:half])
    site.show("/b.m4s", "video/mp4", movie[half:])
    url = site.show("/film.mpd", "application/dash+xml", manifest("a.m4s", "b.m4s"))
    assert fetched(url, folder, site).suffix == ".mp4"


def remuxed(source: Path, target: Path, container: str, **options: str) -> bytes:
    with (
        av.open(str(source)) as old,
        av.open(str(target), "w", format=container, options=options) as new,
    ):
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    return target.read_bytes()


def playlist(*segments: str, more: str = "", seconds: float = 3, end: bool = True) -> str:
    lines = "".join(f"#EXTINF:{seconds},\n{segment}\n" for segment in segments)
    head = f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:3\n{more}"
    return head + lines + ("#EXT-X-ENDLIST\n" if end else "")


def manifest(first: str, second: str, base: str = "", kind: str = "static") -> str:
    return (
        f'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="{kind}" '
        f'mediaPresentationDuration="PT6S"><Period>{base}<AdaptationSet mimeType="video/mp4">'
        '<Representation id="1" width="320" height="240" codecs="avc1.42c01e" bandwidth="9">'
        f'<SegmentList duration="3"><Initialization sourceURL="{first}"/>'
        f'<SegmentURL media="{second}"/></SegmentList>'
        "</Representation></AdaptationSet></Period></MPD>"
    )


# Where nobody may be led.


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "localhost", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0.0.0.0"),
        *("[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::]"),
    ],
)
def test_this_machine_is_refused_in_every_notation(
    host: str, forbidden: int, tmp_path: Path
) -> None:
    url = f"http://{host}:{forbidden}/film.mp4"
    assert "public website" in refused(url, tmp_path, Guard(ports=ALL_PORTS))


@pytest.mark.parametrize(
    "url",
    [
        *("file:///etc/passwd", "FILE:/etc/passwd", "ftp://127.0.0.1/film.mp4", "ytsearch:cats"),
        *("data:video/mp4;base64,AAAA", "rtmp://127.0.0.1/a", "javascript:alert(1)", "http://"),
        *("http://1.1.1.1@127.0.0.1/", "http://127.0.0.1\\@1.1.1.1/", "http://[::1", "http://a b/"),
        *("http://1.1.1.1:0/", "http://1.1.1.1:99999/", "http://1.1.1.1/\r\nHost: x", "x" * 3000),
        'http://1.1.1.1/#__youtubedl_smuggle={"http_headers":{}}',
    ],
)
def test_what_is_no_plain_web_address_is_refused_at_once(url: str, tmp_path: Path) -> None:
    started = time.monotonic()
    refused(url, tmp_path)
    assert time.monotonic() - started < 0.5


def test_addresses_as_browsers_show_them() -> None:
    assert check_url(" example.org/a?b=c#d ") == "https://example.org/a?b=c#d"
    assert check_url("HTTP://example.org:8080/") == "HTTP://example.org:8080/"
    with pytest.raises(InputError, match="Paste the web address"):
        check_url("  ")


@pytest.mark.parametrize(
    "target",
    [
        "http://127.0.0.1:{port}/film.mp4",
        "http://[::ffff:127.0.0.1]:{port}/",
        "http://2130706433:{port}/",
        "http://someone@127.0.0.1:{port}/",
        "http://169.254.169.254/latest/meta-data/",
    ],
)
def test_redirects_to_forbidden_addresses(
    target: str, site: Site, forbidden: int, tmp_path: Path
) -> None:
    second = site.redirect("/second", target.format(port=forbidden), 307)
    sentence = refused(site.redirect("/first", second), tmp_path, site.guard)
    # With a user name urllib takes all of it for the host's name, and finds none.
    assert ("could not be reached" if "@" in target else "public website") in sentence
    assert "/second" in site.asked


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1:{port}/film.mp4"])
def test_redirects_to_other_protocols(
    target: str, site: Site, forbidden: int, tmp_path: Path
) -> None:
    refused(site.redirect("/first", target.format(port=forbidden)), tmp_path, site.guard)


@pytest.mark.parametrize("way", ["segment", "second", "key", "map", "variant", "file", "redirect"])
def test_hls_that_names_forbidden_addresses(
    way: str, site: Site, forbidden: int, tmp_path: Path
) -> None:
    inner = f"http://127.0.0.1:{forbidden}/inner"
    site.show("/a.ts", "video/mp2t", b"G" * 188)
    text = {
        "segment": playlist(inner),
        "second": playlist("a.ts", inner),
        "key": playlist("a.ts", more=f'#EXT-X-KEY:METHOD=AES-128,URI="{inner}"\n'),
        "map": playlist("a.ts", more=f'#EXT-X-MAP:URI="{inner}"\n'),
        "variant": f"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{inner}.m3u8\n",
        "file": playlist("file:///etc/passwd"),
        "redirect": playlist("/away"),
    }[way]
    site.redirect("/away", inner)
    url = site.show("/film.m3u8", "application/x-mpegurl", text)
    refused(url, tmp_path, site.guard)


@pytest.mark.parametrize("way", ["initialization", "segment", "base"])
def test_dash_that_names_forbidden_addresses(
    way: str, site: Site, forbidden: int, tmp_path: Path
) -> None:
    inner = f"http://127.0.0.1:{forbidden}/inner"
    site.show("/a.m4s", "video/mp4", b"\0\0\0\x08free")
    text = {
        "initialization": manifest(inner, "a.m4s"),
        "segment": manifest("a.m4s", inner),
        "base": manifest("a.m4s", "a.m4s", base=f"<BaseURL>{inner}/</BaseURL>"),
    }[way]
    url = site.show("/film.mpd", "application/dash+xml", text)
    assert "public website" in refused(url, tmp_path, site.guard)


@dataclass
class Rebinding:
    """A name server that first names the allowed server, and from then on an inner one."""

    later: str
    times: int = 0

    def __call__(self, name: str) -> list[str]:
        self.times += 1
        return ["127.0.0.1" if self.times == 1 else self.later]


def test_a_name_that_changes_its_address(
    site: Site, forbidden: int, videos: dict[str, Path], tmp_path: Path
) -> None:
    site.show("/film.mp4", "video/mp4", videos["h264"].read_bytes())
    allow = ("127.0.0.1", site.port)
    guard = Guard(resolve=Rebinding("127.0.0.2"), allow=allow, ports=ALL_PORTS)
    film = f"http://rebinding.test:{site.port}/film.mp4"
    fetch(film, tmp_path, SETTINGS, progress=lambda *_: None, stop=never, guard=guard)
    assert len(site.asked) >= 2  # once to look, once to fetch
    folder = tmp_path / "other"
    folder.mkdir()
    site.redirect("/film.mp4", f"http://rebinding.test:{forbidden}/")
    assert "public website" in refused(film, folder, guard)


# Limits.


def endless(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", handler.path.split(".")[1].replace("-", "/"))
    handler.end_headers()
    for _ in itertools.count():
        handler.wfile.write(b"\x00" * 65536)


def slow(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "video/mp4")
    handler.end_headers()
    handler.wfile.write(b"\x00" * 65536)
    for _ in range(600):
        handler.wfile.write(b"\x00")
        handler.wfile.flush()
        time.sleep(0.1)


@pytest.mark.parametrize("path", ["/film.video-mp4", "/page.text-html"])
def test_a_response_without_an_end(path: str, site: Site, tmp_path: Path) -> None:
    site.pages[path] = endless
    sentence = refused(site.url(path), tmp_path, site.guard, max_fetch_bytes=3_000_000)
    assert "larger than the 3 MB" in sentence


def test_a_response_that_says_it_is_too_large(site: Site, tmp_path: Path) -> None:
    site.pages["/film.mp4"] = lambda handler: (
        handler.send_response(200),
        handler.send_header("Content-Type", "video/mp4"),
        handler.send_header("Content-Length", str(10**12)),
        handler.end_headers(),
        handler.wfile.write(b"\x00" * 65536),
        time.sleep(5),
    )
    started = time.monotonic()
    assert "larger than" in refused(site.url("/film.mp4"), tmp_path, site.guard)
    assert time.monotonic() - started < PATIENCE


def test_a_slow_response(site: Site, tmp_path: Path) -> None:
    site.pages["/film.mp4"] = slow
    sentence = refused(site.url("/film.mp4"), tmp_path, site.guard, max_fetch_seconds=4)
    assert "within 4 seconds" in sentence


@pytest.mark.parametrize("deleted", [False, True])
def test_cancel(deleted: bool, site: Site, tmp_path: Path) -> None:
    """By the visitor's click, or because the visitor's folder is gone."""
    site.pages["/film.mp4"] = slow
    folder = tmp_path / "visitor"
    folder.mkdir()
    since: list[float] = []

    def progress(done: int, total: int | None) -> None:
        if not since:
            since.append(time.monotonic())
            if deleted:
                (next(folder.iterdir()) / "video").unlink()
                next(folder.iterdir()).rmdir()

    with pytest.raises(Stopped):
        fetch(
            site.url("/film.mp4"),
            folder,
            SETTINGS,
            progress=progress,
            stop=lambda: bool(since) and not deleted,
            guard=site.guard,
        )
    assert time.monotonic() - since[0] < 1
    assert list(folder.iterdir()) == []


def test_what_is_live_long_or_protected(site: Site, tmp_path: Path) -> None:
    key = (
        '#EXT-X-KEY:METHOD=SAMPLE-AES,URI="skd://key",KEYFORMAT="com.apple.streamingkeydelivery"\n'
    )
    kind = "application/x-mpegurl"
    site.show("/a.ts", "video/mp2t", b"G" * 188)
    for text, said in (
        (playlist("a.ts", end=False), "live stream"),
        (playlist("a.ts", seconds=10**6), "longer than the 240 minutes"),
        (playlist("a.ts", more=key), "protected"),
    ):
        assert said in refused(site.show("/film.m3u8", kind, text), tmp_path, site.guard)
    assert "/a.ts" not in site.asked


def test_what_is_no_video(site: Site, tmp_path: Path) -> None:
    words = "<html><body>Words and nothing else.</body></html>"
    url = site.show("/words", "text/html", words)
    assert "No video was found" in refused(url, tmp_path, site.guard)
    assert "not available" in refused(site.url("/nothing-here"), tmp_path, site.guard)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        ("[youtube] a: Sign in to confirm you’re not a bot. Use --cookies", "robot"),
        ("[youtube] a: Sign in to confirm your age", "login"),
        ("[vimeo] 1: The web client only works when logged-in. Use --cookies", "login"),
        ("[youtube] a: Private video. Sign in if you've been granted access", "private"),
        ("[x] a: This video is not available from your location due to geo restriction", "country"),
        ("[youtube] a: Video unavailable", "gone"),
        ("[generic] Unable to download webpage: HTTP Error 404: Not Found", "gone"),
        ("[x] a: This video is DRM protected", "protected"),
        ("[youtube] a: This live event will begin in 3 days.", "live"),
        ("Unsupported URL: https://example.org/login", "nothing"),
        ("unable to write data: [Errno 28] No space left on device", "full"),
        ("something that nobody foresaw", "failed"),
    ],
)
def test_what_sites_say_is_put_into_a_sentence(error: str, why: str) -> None:
    from app.fetch_child import _meaning

    assert _meaning(error) == why


def test_the_page_does_not_import_the_downloader() -> None:
    script = "import sys, app.fetch, app.ui; assert 'yt_dlp' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
