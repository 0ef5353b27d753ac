"""The child that fetches: yt-dlp, reduced to what one public, finished video needs.

Imported in that child alone, after the guard is installed. What is left of yt-dlp: one way to
send a request (urllib, http and https), three ways to download (one file, HLS, DASH), no other
programs, no cookies, settings, plugins, playlists or live streams.
"""

from __future__ import annotations

import functools
import re
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from yt_dlp import YoutubeDL
from yt_dlp.downloader.dash import DashSegmentsFD
from yt_dlp.downloader.hls import HlsFD
from yt_dlp.downloader.http import HttpFD
from yt_dlp.networking import Request, Response
from yt_dlp.networking._urllib import UrllibRH
from yt_dlp.utils import YoutubeDLError, determine_protocol

from app.fetch import VIDEO, Order, Refused, Why

# What an error says, and what it means; the first that fits. Addresses are left out before.
_SIGNS: tuple[tuple[Why, str], ...] = (
    ("full", r"errno 28|no space left"),
    ("large", r"errno 27|file too large"),
    ("robot", r"\bbots?\b|captcha|cloudflare|too many requests|\b429\b|rate.?limit"),
    ("private", r"private"),
    ("country", r"\bgeo|country|countries|your location|your region"),
    ("login", r"sign.?in|log.?in|logged|cookies|account|members|subscri|purchas|paid|\bage\b|401"),
    ("protected", r"\bdrm\b"),
    ("live", r"live (?:stream|event|broadcast)|livestream|premiere|will begin|not started"),
    ("gone", r"unavailable|not available|removed|deleted|no longer|terminated|\b40[34]\b|\b410\b"),
    ("nothing", r"unsupported url|no video|no media|no formats|format is not|unable to extract"),
    ("unreachable", r"timed out|errno|connect|ssl|certificate|unreachable|\b50\d\b|incomplete"),
)
_PAGE_BYTES = 32 << 20  # of one response that is not the video
_BLOCK_BYTES = 1 << 16
_REPORT_SECONDS = 0.2
_FRAGMENTED = ("m3u8", "m3u8_native", "http_dash_segments")


def download(order: Order, report: Callable[[int, int | None], None]) -> str:
    """Fetch the video into the order's folder as `VIDEO` and return its title."""
    try:
        with _Site(_options(order), order.max_bytes) as site:
            info = site.extract_info(order.url, download=False)
            _check(info, order.max_duration)
            protocol = determine_protocol(info)
            downloader = _DOWNLOADERS[protocol](site, site.params)
            downloader.max_duration = order.max_duration
            downloader.add_progress_hook(_hook(order.max_bytes, report))
            arrived, _ = downloader.download(str(order.folder / VIDEO), dict(info))
            if not arrived:
                raise Refused("failed")
    except (YoutubeDLError, OSError) as error:
        raise Refused(_meaning(str(error))) from error
    _stand_alone(order.folder / VIDEO)
    return str(info.get("title") or "")


def _options(order: Order) -> dict[str, Any]:
    protocols = "|".join(("https?", *_FRAGMENTED))
    return {
        # Small and quick to decode comes first; sound is of no use.
        "format": f"bv*[protocol~='^({protocols})$']",
        "format_sort": ["res:480", "vcodec:h264", "+hasaud", "proto"],
        "format_sort_force": True,
        "noplaylist": True,
        "extract_flat": "in_playlist",
        "playlist_items": "1",
        "dynamic_mpd": False,  # DASH that is still being made
        "hls_prefer_native": True,
        "skip_unavailable_fragments": False,
        "ffmpeg_location": str(order.folder / "none"),
        "fixup": "never",
        "cachedir": False,
        "proxy": "",
        "geo_bypass": False,
        "retries": 2,
        "fragment_retries": 2,
        "extractor_retries": 1,
        "file_access_retries": 0,
        "socket_timeout": 15,
        "nopart": True,
        "continuedl": False,
        "updatetime": False,
        "quiet": True,
        "noprogress": True,
        "logger": _Silence(),
    }


class _Silence:
    """What yt-dlp would print; errors are raised besides."""

    def debug(self, text: str) -> None: ...

    def warning(self, text: str) -> None: ...

    def error(self, text: str) -> None: ...


class _WebRH(UrllibRH):
    """The one way to send a request; yt-dlp wants the name to end in RH."""

    _SUPPORTED_URL_SCHEMES = ("http", "https")
    _SUPPORTED_PROXY_SCHEMES = ()

    def _get_proxies(self, request: Request) -> dict[str, str]:
        return {}  # a page could name one

    def _create_instance(self, **options: Any) -> urllib.request.OpenerDirector:
        opener = super()._create_instance(**options)
        for scheme in ("data", "file", "ftp"):  # where a redirect could lead
            opener.handle_open.pop(scheme, None)
        return opener


class _Site(YoutubeDL):
    """yt-dlp with one way to send requests, and a limit on what it reads."""

    def __init__(self, options: dict[str, Any], max_bytes: int) -> None:
        self._bytes_left = max_bytes
        super().__init__(options)

    def build_request_director(self, handlers: Any, preferences: Any = None) -> Any:
        """Leave out every handler but ours, whatever is installed."""
        return super().build_request_director([_WebRH])

    def urlopen(self, req: Any) -> Response:
        """Open; what is read from the response is counted."""
        response = super().urlopen(req)
        response.read = functools.partial(self._read, response.read)
        return response

    def _read(self, read: Callable[[int], bytes], amount: int | None = None) -> bytes:
        if amount is None:
            return self._read_page(read)
        data = read(amount)
        self._bytes_left -= len(data)
        if self._bytes_left < 0:
            raise Refused("large")
        return data

    def _read_page(self, read: Callable[[int], bytes]) -> bytes:
        page = bytearray()
        while block := self._read(read, _BLOCK_BYTES):
            page += block
            if len(page) > _PAGE_BYTES:
                raise Refused("large")
        return bytes(page)


class _FinishedHls(HlsFD):
    """HLS that has an end and no protection; the rest would be handed to FFmpeg."""

    max_duration = 0.0

    def can_download(
        self, manifest: str, info_dict: dict[str, Any], allow_unplayable_formats: bool = False
    ) -> bool:
        """Say yes, or raise `Refused`."""
        if "#EXT-X-ENDLIST" not in manifest:
            raise Refused("live")
        seconds = re.findall(r"#EXTINF:\s*(\d+(?:\.\d*)?)", manifest)
        if sum(map(float, seconds)) > self.max_duration:
            raise Refused("long")
        if not super().can_download(manifest, info_dict):
            raise Refused("protected")
        return True


_DOWNLOADERS = {
    "http": HttpFD,
    "https": HttpFD,
    "m3u8": _FinishedHls,
    "m3u8_native": _FinishedHls,
    "http_dash_segments": DashSegmentsFD,
}


def _check(info: dict[str, Any] | None, max_duration: float) -> None:
    if not info:
        raise Refused("nothing")
    if info.get("_type", "video") != "video":
        raise Refused("playlist")
    if info.get("is_live") or info.get("live_status") in {"is_live", "is_upcoming", "post_live"}:
        raise Refused("live")
    duration = info.get("duration") or 0.0
    fragments = info.get("fragments")
    if isinstance(fragments, list):
        duration = max(duration, sum(one.get("duration") or 0.0 for one in fragments))
    if duration > max_duration:
        raise Refused("long")


def _hook(
    max_bytes: int, report: Callable[[int, int | None], None]
) -> Callable[[dict[str, Any]], None]:
    last = 0.0

    def hook(state: dict[str, Any]) -> None:
        nonlocal last
        done, total = state.get("downloaded_bytes") or 0, state.get("total_bytes")
        if max(done, total or 0) > max_bytes:
            raise Refused("large")
        if time.monotonic() - last >= _REPORT_SECONDS or state.get("status") == "finished":
            last = time.monotonic()
            likely = total or state.get("total_bytes_estimate")
            report(int(done), int(likely) if likely else None)

    return hook


def _meaning(error: str) -> Why:
    said = re.sub(r"https?://\S+", "", error).lower()
    return next((why for why, pattern in _SIGNS if re.search(pattern, said)), "failed")


def _stand_alone(path: Path) -> None:
    """Put a transport stream, as HLS has it, into an mp4, which players and `probe` take."""
    with path.open("rb") as file:
        start = file.read(189)
    if not (start[:1] == b"G" and start[188:] == b"G"):
        return
    import av

    packed = path.with_name("packed")
    try:
        # Opened as this one format and handed over as a file: nothing else can be reached from it.
        with (
            path.open("rb") as file,
            av.open(file, format="mpegts") as stream,
            av.open(str(packed), "w", format="mp4") as movie,
        ):
            source = stream.streams.video[0]
            copy = movie.add_stream_from_template(source)
            first: int | None = None
            for packet in stream.demux(source):
                if packet.dts is None or packet.pts is None:
                    continue
                first = packet.dts if first is None else first
                packet.dts, packet.pts = packet.dts - first, packet.pts - first
                packet.stream = copy
                movie.mux(packet)
    except (av.error.FFmpegError, IndexError, ValueError) as error:
        raise Refused("damaged") from error
    packed.replace(path)
