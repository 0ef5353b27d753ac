"""Rows 2 to 8 and 10: files that hurt whoever reads them, and the process that does."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from model.types import InputError, ReadBounds, Stopped, VideoInfo, VideoLimits
from model.video_sandbox import decode_frames, probe
from tests.app_server import ROOT
from tests.faults import decoder
from tests.media import make_video

BOUNDS = ReadBounds(check_seconds=60, frame_seconds=60, read_seconds=60, memory=500 * 10**6)
SHORT = ReadBounds(check_seconds=2, frame_seconds=2, read_seconds=2)
SAID = {
    "hang": "took longer than 2 s",
    "spin": "took longer than 2 s",
    "segfault": "decoder crashed",
    "abort": "decoder crashed",
    "greedy": "more memory than is allowed",
    "lie": "decoder crashed",
    "babble": "decoder crashed",
}


@pytest.fixture(autouse=True)
def nothing_is_left() -> None:
    """After every row: no process, no descriptor, no thread."""
    here = psutil.Process()
    before = here.num_fds(), threading.active_count()
    yield
    assert not [one for one in here.children() if "video_child" in " ".join(one.cmdline())]
    assert (here.num_fds(), threading.active_count()) == before


@pytest.fixture
def bad_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.video_sandbox._PROGRAM", ("-m", "tests.faults.decoder"))


def frames(path: Path, info: VideoInfo, bounds: ReadBounds = BOUNDS) -> list[float]:
    with decode_frames(path, [0.0, 1.0, 2.0], info=info, bounds=bounds) as stream:
        return [frame.time for frame in stream]


@pytest.mark.parametrize("task", ["check", "decode"])
@pytest.mark.parametrize("how", decoder.HOW)
def test_a_decoder_that_fails_in_any_way_is_a_sentence(
    task: str, how: str, bad_decoder: None, videos: dict[str, Path], tmp_path: Path
) -> None:
    """Rows 5 and 6."""
    good = probe(videos["h264"], bounds=BOUNDS)
    path = decoder.mark(videos["h264"], tmp_path / "bad.mp4", task, how)
    bounds = SHORT if how in ("hang", "spin") else BOUNDS
    if task == "check":
        with pytest.raises(InputError, match=SAID[how]):
            probe(path, bounds=bounds)
    else:
        info = probe(path, bounds=BOUNDS)
        with pytest.raises(InputError, match=SAID[how]):
            frames(path, info, bounds)
    assert len(frames(videos["h264"], good)) == 3  # the next one is as before


def test_a_hanging_decoder_is_left_at_once_when_stopped(
    bad_decoder: None, videos: dict[str, Path], tmp_path: Path
) -> None:
    """Rows 5 and 16."""
    path = decoder.mark(videos["h264"], tmp_path / "bad.mp4", "check", "hang")
    started = time.monotonic()
    with pytest.raises(Stopped):
        probe(path, bounds=BOUNDS, stop=lambda: time.monotonic() > started + 0.5)
    assert time.monotonic() - started < 10  # not its deadline of 60 s


def test_a_decoder_ends_with_whoever_waits_for_it(videos: dict[str, Path], tmp_path: Path) -> None:
    """Rows 5 and 21: the reader is killed, its decoder hangs; neither stays."""
    path = decoder.mark(videos["h264"], tmp_path / "bad.mp4", "check", "hang")
    script = (
        "from tests.faults import decoder; from model.video_sandbox import probe\n"
        f"decoder.use(); probe({str(path)!r})"
    )
    reader = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    deadline = time.monotonic() + 60
    children: list[psutil.Process] = []
    while not children and time.monotonic() < deadline:
        children = psutil.Process(reader.pid).children()
        time.sleep(0.05)
    os.kill(reader.pid, signal.SIGKILL)
    reader.wait()
    _, alive = psutil.wait_procs(children, 30)
    assert children and not alive


def test_the_decoder_has_no_network_no_programs_and_cannot_write(tmp_path: Path) -> None:
    """Row 10: whatever a file makes the decoder do, there is nothing to do it with."""
    tries = {
        "network": "socket.socket()",
        "program": "subprocess.run(['true'])",
        "fork": "os.fork()",
        "write": f"open({str(tmp_path / 'new')!r}, 'w')",
        "delete": f"os.unlink({str(tmp_path / 'kept')!r})",
        "signal": "os.kill(os.getppid(), 0)",
    }
    (tmp_path / "kept").touch()
    script = (
        "import os, socket, subprocess\n"
        "from model.process_limits import close_doors, limit\n"
        "limit(1 << 30, 10, 10)\n"
        "assert close_doors()\n"
        f"for name, attempt in {tries!r}.items():\n"
        "    try:\n        eval(attempt); print(name)\n"
        "    except OSError:\n        pass\n"
        "print(len(open('/proc/self/status').read()) > 0)\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert told.stdout.split() == ["True"]
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_what_is_no_video_is_told_quickly(videos: dict[str, Path]) -> None:
    """Rows 2 and 3."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "import model.video"], cwd=ROOT, check=True)
    busy = time.monotonic() - started  # how long a start takes on this machine
    for kind, said in (("empty", "empty"), ("text", "not a video"), ("truncated", "cut off")):
        started = time.monotonic()
        with pytest.raises(InputError, match=said):
            probe(videos[kind], bounds=BOUNDS)
        assert time.monotonic() - started < 2 + 3 * busy


def test_the_limits_reach_the_decoder(videos: dict[str, Path]) -> None:
    """Rows 7 to 9: pixels, duration and frames."""
    for limits, said in (
        (VideoLimits(max_pixels=100), "at most 100 pixels"),
        (VideoLimits(max_duration=3), "at most 0 minutes"),
        (VideoLimits(max_packets=10), "more than 10 frames"),
    ):
        with pytest.raises(InputError, match=said):
            probe(videos["h264"], limits, bounds=BOUNDS)


def test_a_playlist_called_mp4_opens_nothing(tmp_path: Path) -> None:
    """Row 10: HLS and concat lists that name a web server and a file."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        port = listener.getsockname()[1]
        for number, text in enumerate(
            (
                f"#EXTM3U\n#EXTINF:9,\nhttp://127.0.0.1:{port}/a.ts\n#EXT-X-ENDLIST\n",
                "#EXTM3U\n#EXTINF:9,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
                "ffconcat version 1.0\nfile /etc/passwd\n",
                f"<MPD><BaseURL>http://127.0.0.1:{port}/</BaseURL></MPD>",
            )
        ):
            path = tmp_path / f"list{number}.mp4"
            path.write_text(text)
            with pytest.raises(InputError, match="not a video"):
                probe(path, bounds=BOUNDS)
        with pytest.raises(TimeoutError):
            listener.accept()


def test_a_codec_that_nobody_knows_and_titles_that_are_no_text(tmp_path: Path) -> None:
    """Row 8: found by fuzzing."""
    film, odd = tmp_path / "film.mkv", tmp_path / "odd.mp4"
    make_video(film, duration=2, fps=10, size=(96, 64))
    content = film.read_bytes()
    assert b"V_MPEG4/ISO/AVC" in content and b"00:00:02.00" in content
    odd.write_bytes(content.replace(b"V_MPEG4/ISO/AVC", b"V_NONSENSE/NONE"))
    with pytest.raises(InputError, match="coded as an unknown format"):
        probe(odd, bounds=BOUNDS)
    odd.write_bytes(content.replace(b"00:00:02.00", b"00:00:02.\xc6\xdf"))
    assert probe(odd, bounds=BOUNDS).codec == "h264"
