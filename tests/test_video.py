"""Video input. The pictures themselves tell which frame they are, so reported times are checked."""

from __future__ import annotations

import itertools
import os
import socket
import struct
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from model.types import InputError, Stopped
from model.video import VideoLimits, decode_frames, probe, sample_times
from model.video_container import LocalFile, OpenVideo
from model.video_decoders import plan, windows
from model.video_index import build_index
from tests.media import flip_bits, loop_video, make_sound, make_video, read_number, truncate

FILES = [
    ("libx264", "h264", "mp4"),
    ("libx264", "h264", "mov"),
    ("libx264", "h264", "mkv"),
    ("libx265", "hevc", "mp4"),
    ("libx265", "hevc", "mkv"),
    ("libvpx-vp9", "vp9", "mp4"),
    ("libvpx-vp9", "vp9", "webm"),
    ("libvpx-vp9", "vp9", "mkv"),
    ("libsvtav1", "av1", "mp4"),
    ("libsvtav1", "av1", "webm"),
    ("libsvtav1", "av1", "mkv"),
    ("libvpx", "vp8", "webm"),
    ("mpeg4", "mpeg4", "mp4"),
    ("mpeg4", "mpeg4", "avi"),
]


NO_SCENE_CUTS = {"sc_threshold": "0"}  # x264 then places keyframes by `gop` alone


def never() -> bool:
    return False


def check(path: Path, shown: np.ndarray, wanted: np.ndarray, **options: object) -> list:
    """Decode; each picture must be of the time it tells, near enough, and none come twice."""
    reader = decode_frames(path, wanted, **options)
    frames = list(reader)
    assert reader.failed == 0
    low, high = windows(wanted)
    numbers = [read_number(frame.image) for frame in frames]
    assert numbers == sorted(set(numbers))
    for frame, number in zip(frames, numbers, strict=True):
        assert frame.time == pytest.approx(shown[number], abs=0.002)
        near = (shown >= low[frame.index] + 1e-6) & (shown < high[frame.index] - 1e-6)
        if near.any():
            assert low[frame.index] - 0.002 <= frame.time <= high[frame.index] + 0.002
    got = {frame.index for frame in frames}
    for i in range(len(wanted)):
        if np.any((shown >= low[i] + 0.002) & (shown < high[i] - 0.002)):
            assert i in got, f"no frame for {wanted[i]} s although there is one"
    return frames


@pytest.mark.parametrize("variable", [False, True], ids=["cfr", "vfr"])
@pytest.mark.parametrize(("encoder", "codec", "suffix"), FILES)
def test_every_codec_and_container(
    tmp_path: Path, encoder: str, codec: str, suffix: str, variable: bool
) -> None:
    path = tmp_path / f"video.{suffix}"
    shown = make_video(path, codec=encoder, duration=2, gop=20, vfr=variable)
    info = probe(path)
    assert (info.codec, info.width, info.height, info.rotation) == (codec, 320, 180, 0)
    assert info.num_frames == len(shown)
    last_frames = 0.0 if suffix != "mp4" and variable else 0.05
    assert shown[-1] - 0.002 <= info.duration <= shown[-1] + 0.2 + last_frames
    assert info.size_bytes == path.stat().st_size
    for rate in (1.0, 4.0, 11.0):
        check(path, shown, sample_times(info.duration, max_frames=100, frame_rate=rate))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, np.ndarray]]:
    """H.264 with B-frames: many keyframes, few, one; no index; and with gaps."""
    folder = tmp_path_factory.mktemp("clips")
    made = {}
    for name, suffix, settings in (
        ("dense", "mp4", {"gop": 10}),
        ("few", "mp4", {"gop": 100}),
        ("few", "mkv", {"gop": 100}),
        ("one", "mp4", {"gop": 10000}),
        ("fragments", "mp4", {"container_options": {"movflags": "frag_keyframe+empty_moov"}}),
        ("live", "mkv", {"gop": 50, "container_options": {"live": "1"}}),
        ("gaps", "mp4", {"gop": 100, "vfr": True}),
    ):
        path = folder / f"{name}.{suffix}"
        settings = {"gop": 50, "options": NO_SCENE_CUTS, **settings}
        shown = make_video(path, duration=16, size=(160, 96), **settings)
        made[path.name] = path, shown
    return made


@pytest.mark.parametrize(
    "name",
    ["dense.mp4", "few.mp4", "few.mkv", "one.mp4", "fragments.mp4", "live.mkv", "gaps.mp4"],
)
@pytest.mark.parametrize("count", [1, 2, 4, 7, 16, 40, 130, 400])
def test_true_times_for_every_way_of_reading(
    clips: dict[str, tuple[Path, np.ndarray]], name: str, count: int
) -> None:
    path, shown = clips[name]
    wanted = np.arange(count) * (shown[-1] + 0.02) / count
    frames = check(path, shown, wanted)
    if count == 400 and name != "gaps.mp4":
        assert len(frames) == 400  # every frame of the video


def test_decord_agrees(clips: dict[str, tuple[Path, np.ndarray]]) -> None:
    for name in ("dense.mp4", "few.mkv", "gaps.mp4"):
        path, shown = clips[name]
        for count in (3, 40):
            wanted = np.arange(count) * shown[-1] / count
            ours = check(path, shown, wanted)
            theirs = check(path, shown, wanted, decoder="decord")
            assert len(ours) == len(theirs)
            assert ours[0].image.shape == theirs[0].image.shape


def test_decord_says_that_it_cannot_read_av1(tmp_path: Path) -> None:
    make_video(tmp_path / "video.mp4", codec="libsvtav1", duration=1)
    with pytest.raises(InputError, match="decord cannot read av1"):
        next(decode_frames(tmp_path / "video.mp4", [0.0], decoder="decord"))


def test_the_cheapest_way_is_planned() -> None:
    keys = np.arange(0, 3600, 10.0)
    minute = plan(np.arange(0, 3600, 56.0), keys)
    assert all(segment.key_only for segment in minute)  # keyframes are dense enough
    second = plan(np.arange(0, 3600, 1.0), keys)
    assert [segment.targets for segment in second[:2]] == [tuple(range(10)), tuple(range(10, 20))]
    half = plan(np.arange(0, 3600, 5.0), keys)
    assert half[0].targets == (0, 1) and half[1].key == 1
    assert plan([3.0, 4.0], np.array([0.0]))[0].targets == (0, 1)


def test_a_still_picture_is_returned_once(tmp_path: Path) -> None:
    path = tmp_path / "slow.mp4"
    shown = make_video(path, duration=20, fps=0.25)
    frames = check(path, shown, np.arange(0, 20, 1.0))
    assert [round(frame.time) for frame in frames] == [0, 4, 8, 12, 16]


def test_the_picture_before_a_gap_stands_in(clips: dict[str, tuple[Path, np.ndarray]]) -> None:
    path, shown = clips["gaps.mp4"]
    gap = int(np.argmax(np.diff(shown)))
    inside = shown[gap] + np.array([0.4, 0.6])
    frames = list(decode_frames(path, inside))
    assert len(frames) == 1 and frames[0].time <= shown[gap] + 0.002


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotated_videos_stand_upright(
    tmp_path: Path, rotation: int, suffix: str, decoder: str
) -> None:
    path = tmp_path / f"turned.{suffix}"
    shown = make_video(path, duration=1, rotation=rotation)
    info = probe(path)
    assert (info.width, info.height, info.rotation) == (320, 180, rotation)
    frames = check(path, shown, np.array([0.0, 0.5]), decoder=decoder)
    assert frames[0].image.shape == (180, 320, 3)


def test_a_mirrored_video_is_mirrored_back(tmp_path: Path) -> None:
    source, mirrored = tmp_path / "source.mp4", tmp_path / "mirrored.mp4"
    make_video(source, duration=0.4)
    with av.open(str(source)) as reader, av.open(str(mirrored), "w") as writer:
        stream = writer.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 320, 180, "yuv420p"
        stream.set_display_rotation(0, hflip=True)
        for frame in reader.decode(video=0):
            flipped = np.ascontiguousarray(frame.to_ndarray(format="rgb24")[:, ::-1])
            writer.mux(stream.encode(av.VideoFrame.from_ndarray(flipped, format="rgb24")))
        writer.mux(stream.encode(None))
    frames = list(decode_frames(mirrored, [0.12, 0.2, 0.28]))
    assert [read_number(frame.image) for frame in frames] == [3, 5, 7]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_first_frame_is_time_zero(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"late.{suffix}"
    shown = make_video(path, duration=2, start=5.0)
    assert probe(path).duration == pytest.approx(2.0, abs=0.01)
    assert check(path, shown, np.array([0.0, 1.0]))[0].time == 0


def test_shapes(tmp_path: Path) -> None:
    wide, odd = tmp_path / "wide.mkv", tmp_path / "odd.webm"
    make_video(wide, duration=0.2, size=(240, 180), aspect=Fraction(4, 3))
    assert (probe(wide).width, probe(wide).height) == (320, 180)
    assert next(decode_frames(wide, [0.0])).image.shape == (180, 320, 3)
    assert next(decode_frames(wide, [0.0], max_side=160)).image.shape == (90, 160, 3)
    assert next(decode_frames(wide, [0.0], decoder="decord")).image.shape == (180, 320, 3)
    make_video(odd, codec="libvpx-vp9", duration=0.2, size=(321, 181))
    frame = next(decode_frames(odd, [0.0]))
    assert frame.image.shape == (181, 321, 3) and read_number(frame.image) == 0
    tall = tmp_path / "tall.mp4"
    make_video(tall, duration=0.2, size=(180, 320), rotation=90)
    assert next(decode_frames(tall, [0.0], max_side=64)).image.shape == (64, 36, 3)


def test_colours(tmp_path: Path) -> None:
    """An untold small video is BT.601, as it was written; pictures keep their colours."""
    path = tmp_path / "red.mp4"
    make_video(path, duration=0.2, pattern="plain", crf=5)
    image = next(decode_frames(path, [0.0])).image
    assert np.abs(image[100:].reshape(-1, 3).mean(0) - (200, 60, 40)).max() < 6


def test_sample_times() -> None:
    assert sample_times(4.0, max_frames=8).tolist() == [0, 1, 2, 3]
    assert sample_times(4.2, max_frames=8).tolist() == [0, 1, 2, 3, 4]
    assert sample_times(0.04, max_frames=8).tolist() == [0]
    assert sample_times(2.0, max_frames=8, frame_rate=2).tolist() == [0, 0.5, 1, 1.5]
    long = sample_times(3600, max_frames=64)
    assert len(long) == 64 and np.allclose(np.diff(long), 56.25) and long[0] == 0
    for bad in ({"duration": 0}, {"duration": float("nan")}, {"duration": 1, "max_frames": 0}):
        with pytest.raises(ValueError, match="above 0"):
            sample_times(**{"max_frames": 8, **bad})


def test_files_that_are_no_video(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("This is not a video.\n" * 50)
    (tmp_path / "box.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(500))
    make_sound(tmp_path / "sound.mp4")
    make_video(tmp_path / "film.mp4", duration=1)
    truncate(tmp_path / "film.mp4", tmp_path / "cut.mp4", 0.6)
    for name, words in (
        ("missing.mp4", "no such file"),
        ("empty.mp4", "empty"),
        ("text.mp4", "not a video"),
        ("box.mp4", "cut off"),
        ("sound.mp4", "only sound"),
        ("cut.mp4", "cut off"),
        (".", "no such file"),
    ):
        start = time.monotonic()
        with pytest.raises(InputError, match=words) as caught:
            probe(tmp_path / name)
        assert "\n" not in str(caught.value) and time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("suffix", "codec"), [("mkv", "ffv1"), ("avi", "mjpeg"), ("flv", "flv1"), ("ts", "mpeg2video")]
)
def test_other_codecs_and_containers_are_refused(tmp_path: Path, suffix: str, codec: str) -> None:
    path = tmp_path / f"other.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = 64, 64
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    words = "can be read"
    with pytest.raises(InputError, match=words):
        probe(path.rename(tmp_path / "other.mp4"))


def test_playlists_open_nothing(tmp_path: Path) -> None:
    make_video(tmp_path / "film.mp4", duration=0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/film.mp4"
        for target in (url, "film.mp4", f"file://{tmp_path}/film.mp4"):
            for text in (
                f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{target}\n#EXT-X-ENDLIST\n",
                f"ffconcat version 1.0\nfile {target}\n",
            ):
                (tmp_path / "list.mp4").write_text(text)
                with pytest.raises(InputError, match="not a video"):
                    probe(tmp_path / "list.mp4")
                # And were the first bytes not looked at, the opener itself refuses.
                with pytest.raises(av.error.FFmpegError):
                    OpenVideo(tmp_path / "list.mp4", never)
        with pytest.raises(TimeoutError):
            server.accept()


def test_limits(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    make_video(path, duration=2)
    for limits, words in (
        (VideoLimits(max_duration=1.0), "minutes"),
        (VideoLimits(max_pixels=320 * 179), "pixels"),
        (VideoLimits(max_packets=49), "frames"),
        (VideoLimits(max_bytes=100), "MiB"),
    ):
        with pytest.raises(InputError, match=words):
            probe(path, limits)
    assert probe(path, VideoLimits(2.0, 320 * 180, 50)).num_frames == 50


def patched(source: Path, path: Path, box: bytes, offset: int, *numbers: int) -> Path:
    """Copy an mp4 with 32-bit numbers of one of its boxes replaced."""
    data = bytearray(source.read_bytes())
    at = data.index(box) + offset
    data[at : at + 4 * len(numbers)] = struct.pack(f">{len(numbers)}I", *numbers)
    path.write_bytes(bytes(data))
    return path


def test_lying_headers(tmp_path: Path) -> None:
    film = tmp_path / "film.mp4"
    make_video(film, duration=2)
    lying = patched(film, tmp_path / "long.mp4", b"mvhd", 20, 2**31)
    assert probe(lying).duration == pytest.approx(2.0, abs=0.01)
    many = patched(film, tmp_path / "many.mp4", b"stsz", 8, 1, 2**31 - 1)
    with pytest.raises(InputError):
        probe(many)
    huge = patched(film, tmp_path / "huge.mp4", b"avc1", 28, (16384 << 16) | 16384)
    assert probe(huge).width == 320  # the coded size counts, and is checked too
    none = patched(film, tmp_path / "none.mp4", b"stsz", 8, 0, 0)
    with pytest.raises(InputError, match="no frames|cannot|damaged"):
        probe(none)


def test_index_from_the_table_and_from_the_packets_agree(tmp_path: Path) -> None:
    made = {}
    for name, options in (
        ("table.mp4", {}),
        ("fragments.mp4", {"movflags": "frag_keyframe+empty_moov"}),
        ("live.mkv", {"live": "1"}),
    ):
        make_video(tmp_path / name, duration=3, gop=25, container_options=options)
        with OpenVideo(tmp_path / name, never) as video:
            made[name] = index = build_index(video, never)
        assert index.count == 75 and index.duration == pytest.approx(3.0, abs=0.002)
        keys = (index.keys - index.first) * float(index.time_base)
        assert np.allclose(keys, [0, 1, 2], atol=index.slack * float(index.time_base) + 0.002)
    assert made["table.mp4"].slack > 0 and made["live.mkv"].slack == 0


@pytest.mark.parametrize(("suffix", "encoder"), [("mkv", "libx264"), ("webm", "libvpx-vp9")])
def test_large_mkv_and_webm_go_by_their_list_of_keyframes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, encoder: str
) -> None:
    path = tmp_path / f"film.{suffix}"
    shown = make_video(path, codec=encoder, duration=12, gop=25)
    exact = probe(path)
    monkeypatch.setattr("model.video_index.CUES_FROM", 0)
    with OpenVideo(path, never) as video:
        assert build_index(video, never).slack > 0
    listed = probe(path)
    assert listed.duration == exact.duration == pytest.approx(12, abs=0.01)
    assert listed.num_frames == pytest.approx(300, rel=0.05) and exact.num_frames == 300
    for count in (5, 30):
        check(path, shown, np.arange(count) * 12 / count)


def test_what_is_there_of_a_cut_file_is_used(tmp_path: Path) -> None:
    for name, options in (("fast.mp4", {"movflags": "faststart"}), ("film.mkv", {})):
        make_video(tmp_path / name, duration=4, gop=25, container_options=options)
        truncate(tmp_path / name, tmp_path / f"cut-{name}", 0.6)
        info = probe(tmp_path / f"cut-{name}")
        assert 1.5 < info.duration < 3.5
        frames = list(
            decode_frames(info.path, sample_times(info.duration, max_frames=50, frame_rate=5))
        )
        assert len(frames) >= 0.8 * 5 * info.duration
        assert all(abs(read_number(f.image) / 25 - f.time) < 0.01 for f in frames)


@pytest.mark.parametrize("encoder", ["libx264", "libx265", "libvpx-vp9", "libsvtav1"])
def test_bit_flips(tmp_path: Path, encoder: str) -> None:
    """Whatever is flipped: frames and a count of the lost ones, or one clear sentence."""
    film, bad = tmp_path / "film.mp4", tmp_path / "bad.mp4"
    make_video(film, codec=encoder, duration=4, gop=25, size=(160, 96))
    wanted = np.arange(0, 4, 0.25)
    lost = 0
    for seed, flips in enumerate((1, 3, 10, 30, 100, 1000)):
        flip_bits(film, bad, flips, seed)
        try:
            reader = decode_frames(bad, wanted)
            frames = list(reader)
        except InputError as error:
            assert str(error).endswith(".")
            continue
        assert len(frames) + reader.failed == len(wanted)
        lost += reader.failed
    assert lost > 0 or encoder == "libx264"  # FFmpeg patches damaged H.264 pictures up


def threads_and_files() -> tuple[int, int]:
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_stop(tmp_path: Path, decoder: str) -> None:
    short, path = tmp_path / "short.mp4", tmp_path / "long.mp4"
    make_video(short, duration=4, size=(640, 360), gop=10000)
    loop_video(short, path, 100)
    info = probe(path)
    wanted = sample_times(info.duration, max_frames=400)
    before = threads_and_files()
    flag = threading.Event()
    reader = decode_frames(path, wanted, stop=flag.is_set, decoder=decoder, info=info)
    assert read_number(next(reader).image) == 0
    flag.set()
    start = time.monotonic()
    with pytest.raises(Stopped):
        list(reader)
    assert time.monotonic() - start < 1
    with pytest.raises(Stopped):
        decode_frames(path, wanted, stop=flag.is_set, decoder=decoder)
    del reader
    if decoder == "pyav":
        assert threads_and_files() == before


def test_stop_while_decoding_towards_the_first_picture(tmp_path: Path) -> None:
    """Both pictures are at the far end of a video with a single keyframe."""
    path = tmp_path / "one.mp4"
    make_video(path, duration=60, size=(64, 48), gop=10000, options=NO_SCENE_CUTS)
    info, looks = probe(path), itertools.count()
    reader = decode_frames(path, [59.0, 59.5], stop=lambda: next(looks) > 300, info=info)
    with pytest.raises(Stopped):
        next(reader)
    assert next(looks) < 400  # gave up at once


def test_a_stopped_file_ends(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(1000))
    flag = threading.Event()
    with LocalFile(tmp_path / "data", flag.is_set) as file:
        assert len(file.read(600)) == 600
        flag.set()
        assert file.read(600) == b""


def test_everything_is_freed(clips: dict[str, tuple[Path, np.ndarray]]) -> None:
    path, _ = clips["dense.mp4"]
    before = threads_and_files()
    for _ in range(20):
        with decode_frames(path, np.arange(0, 16, 0.5)) as reader:
            next(reader)
    with pytest.raises(InputError):
        probe(path.parent / "missing.mp4")
    assert threads_and_files() == before


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    make_video(path, duration=0.4)
    info = probe(path)
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(InputError, match="changed"):
        decode_frames(path, [0.0], info=info)


def test_times_must_increase(clips: dict[str, tuple[Path, np.ndarray]]) -> None:
    path, _ = clips["dense.mp4"]
    for bad in ([], [1.0, 1.0], [2.0, 1.0], [-1.0, 0.0], [[0.0]], [float("nan"), 1.0]):
        with pytest.raises(ValueError, match="increasing"):
            decode_frames(path, bad)
