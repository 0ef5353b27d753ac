"""Decode the frames that stand for a list of desired times, as cheaply as the file allows."""

from __future__ import annotations

import heapq
import itertools
import math
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, VideoReformatter

from model.types import Frame, StopCheck, Stopped
from model.video_container import OpenVideo, Orientation
from model.video_index import PacketIndex, build_index

MAX_WORKERS = 8
QUEUED_FRAMES = 32  # scaled pictures waiting per worker
PICTURE_MEMORY = 1 << 30  # bytes of decoded pictures that all workers may keep for reference
WIDE_WINDOW = 4  # frames each way; a window this wide nearly always holds a reference frame
UNSPECIFIED = 2  # a colour space that the file does not name
SEGMENT_END = object()
# A run's last frame is taken early in its window where that saves this much of decoding.
EARLY_SECONDS = 1.0
EARLY_SHARE = 0.25


def windows(times: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """How early and how late the frame for each time may be: half way to its neighbours.

    Windows do not overlap, so no frame can stand for two times.
    """
    times = np.asarray(times, float)
    steps = np.diff(times) if len(times) > 1 else np.ones(1)
    low = times - np.concatenate([steps[:1], steps])[: len(times)] / 2
    high = times + np.concatenate([steps, steps[-1:]])[-len(times) :] / 2
    return low, high


@dataclass(frozen=True)
class Segment:
    """Desired times that are served by decoding from one keyframe on."""

    key: int  # which keyframe
    targets: tuple[int, ...]  # which desired times
    key_only: bool  # the keyframe itself serves the only one


def plan(times: Sequence[float], keys: np.ndarray) -> list[Segment]:
    """Serve each desired time from the keyframe that makes it cheapest.

    A keyframe inside a window serves it alone. Other times are reached by decoding forward from
    the last keyframe before them, in one pass for all that share it. Where every stretch between
    keyframes is wanted this is reading the whole file; where keyframes are denser than the
    desired times nothing but keyframes is decoded; between the two it is seeking.
    """
    low, high = windows(times)
    after = np.searchsorted(keys, times, "right")
    segments: list[Segment] = []
    for i, time in enumerate(times):
        near = min(
            (int(k) for k in (after[i] - 1, after[i]) if 0 <= k < len(keys)),
            key=lambda k: abs(keys[k] - time),
        )
        inside = bool(low[i] <= keys[near] < high[i])
        key = near if inside else max(0, int(after[i]) - 1)
        if segments and segments[-1].key == key:
            segments[-1] = Segment(key, (*segments[-1].targets, i), False)
        else:
            segments.append(Segment(key, (i,), inside))
    return segments


def fitted_size(width: int, height: int, aspect: Fraction | None, max_side: int) -> tuple[int, int]:
    """Width and height in square pixels, the longer side at most `max_side`."""
    shown = width * float(aspect or 1)
    scale = min(1.0, max_side / max(shown, height))
    return max(1, round(shown * scale)), max(1, round(height * scale))


def available_cores() -> int:
    """CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class PyAVSource:
    """Iterates over the frames of one file for increasing `times`, by way of PyAV.

    Segments are decoded side by side, each worker with a file handle and a decoder of its own:
    on two cores that took 2.2 s where FFmpeg's frame threads took 3.3 s and one thread 3.6 s
    (five minutes of 720p H.264, a keyframe every 10 s).
    """

    def __init__(
        self, path: str | Path, times: Sequence[float], max_side: int, stop: StopCheck
    ) -> None:
        self.path, self.max_side, self.stop = path, max_side, stop
        self.times = [float(time) for time in times]
        self.low, self.high = windows(self.times)
        self.failed = 0  # desired times whose frames did not decode
        self.strategy = ""

    def __iter__(self) -> Iterator[Frame]:
        with OpenVideo(self.path, self.stop) as video:
            index = build_index(video, self.stop)
            stream = video.stream
            picture = max(1, stream.width * stream.height * 3)
        keys = (index.keys - index.first) * float(index.time_base)
        segments = plan(self.times, keys)
        fit = max(1, PICTURE_MEMORY // (20 * picture))  # about 20 pictures live in each decoder
        cores = available_cores()
        workers = min(cores, MAX_WORKERS, fit, len(segments))
        threads = max(1, min(cores, fit) // max(1, workers))
        alone = sum(segment.key_only for segment in segments)
        self.strategy = f"{alone} keyframes, {len(segments) - alone} runs, {workers} workers"
        shown = -1.0
        for frame in self._in_parallel(index, segments, workers, threads):
            if frame is None:
                self.failed += 1
            elif frame.time > shown:  # else the picture still on screen was given already
                shown = frame.time
                yield frame

    def _in_parallel(
        self, index: PacketIndex, segments: list[Segment], workers: int, threads: int
    ) -> Iterator[Frame | None]:
        """Results of all segments in order; segment n is done by worker n modulo `workers`."""
        end = threading.Event()
        queues = [queue.Queue(QUEUED_FRAMES) for _ in range(workers)]

        def stopped() -> bool:
            return end.is_set() or self.stop()

        def put(target: queue.Queue, item: object) -> None:
            while not stopped():
                try:
                    return target.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def work(worker: int) -> None:
            try:
                with _SegmentDecoder(self, index, stopped, threads) as decoder:
                    for segment in segments[worker::workers]:
                        for item in decoder.decode(segment):
                            put(queues[worker], item)
                        put(queues[worker], SEGMENT_END)
            except Exception as error:  # handed to the thread that reads the queue
                put(queues[worker], error)

        pool = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(workers)]
        for thread in pool:
            thread.start()
        try:
            for number in range(len(segments)):
                while (item := self._take(queues[number % workers])) is not SEGMENT_END:
                    yield item
        finally:
            end.set()
            for thread in pool:
                thread.join()

    def _take(self, source: queue.Queue) -> Frame | object | None:
        while not self.stop():
            try:
                item = source.get(timeout=0.1)
            except queue.Empty:
                continue
            if isinstance(item, Exception):
                raise item
            return item
        raise Stopped


class _SegmentDecoder:
    """One open file and decoder; serves segment after segment."""

    def __init__(
        self, source: PyAVSource, index: PacketIndex, stop: StopCheck, threads: int
    ) -> None:
        self._source, self._index, self._stop = source, index, stop
        self._video = OpenVideo(source.path, stop)
        self._stream = self._video.stream
        self._stream.thread_type = "AUTO" if threads > 1 else "NONE"
        self._stream.thread_count = threads
        self._scaler = VideoReformatter()
        self._orientation: Orientation | None = None
        self._fed: list[float] = []  # heap of presentation times given to the decoder in this run
        self._may_skip = True  # frames that no other frame refers to

    def __enter__(self) -> _SegmentDecoder:
        return self

    def __exit__(self, *exception: object) -> None:
        self._video.__exit__(*exception)

    def decode(self, segment: Segment) -> Iterator[Frame | None]:
        """The frames for a segment's times; None for a time whose frames do not decode.

        The cheap way comes first; what it leaves open is tried again with every frame decoded.
        """
        targets = list(segment.targets)
        if segment.key_only:
            yield from self._serve(targets, segment.key, "NONKEY")
        if targets and self._may_skip and self._wide(targets):
            yield from self._serve(targets, segment.key, "NONREF")
            self._may_skip = not targets
        if targets:
            yield from self._serve(targets, segment.key, "DEFAULT")

    def _wide(self, targets: list[int]) -> bool:
        widths = self._source.high[targets] - self._source.low[targets]
        return bool(widths.min() >= 2 * WIDE_WINDOW * self._index.duration / self._index.count)

    def _serve(self, targets: list[int], key: int, skip: str) -> Iterator[Frame | None]:
        """Decode from a keyframe, all but the frames to `skip`; take served targets off the list.

        A run that skips frames ends at a window where it finds none. One that does not gives None
        there; unless the file has no frame for that window, then the one before it is on screen.
        """
        source = self._source
        start = self._index.seconds(int(self._index.keys[key]))
        last, last_time, given = None, -math.inf, -math.inf
        self._stream.codec_context.skip_frame = skip
        frames = self._frames(key, float(source.high[targets[0]]), skip == "NONKEY")
        for frame in itertools.chain(frames, [None]):
            time = math.inf if frame is None else self._index.seconds(frame.pts)
            if time <= last_time:
                continue
            while targets:
                i, want = targets[0], source.times[targets[0]]
                low, high = source.low[i], source.high[i]
                saved = want - low if len(targets) == 1 else 0.0
                early = saved >= max(EARLY_SECONDS, EARLY_SHARE * (want - start))
                if time < (low if early else want):
                    break
                near = [(abs(t - want), t, f) for t, f in ((last_time, last), (time, frame))]
                _, best_time, best = min(near, key=lambda item: item[0])
                if not low <= best_time < high:
                    while self._fed and self._fed[0] < low:
                        heapq.heappop(self._fed)
                    lost = bool(self._fed) and self._fed[0] < high
                    if skip == "NONKEY" or (skip == "NONREF" and lost):
                        return
                    best_time, best = last_time, None if lost else last
                targets.pop(0)
                if best is None:
                    yield None
                elif best_time > given:
                    given = best_time
                    yield self._picture(i, best_time, best)
            if not targets:
                return
            last, last_time = frame, time

    def _picture(self, i: int, time: float, frame: VideoFrame) -> Frame:
        if self._orientation is None:
            self._orientation = Orientation.of(frame)
        image = to_rgb(self._scaler, frame, self._stream.sample_aspect_ratio, self._source.max_side)
        return Frame(i, time, self._orientation.apply(image))

    def _frames(self, key: int, latest: float, single: bool) -> Iterator[VideoFrame]:
        """Decoded frames from a keyframe on, or of its packet only."""
        context = self._stream.codec_context
        for packet in self._packets(key, latest):
            try:
                frames = packet.decode()
                if single:
                    frames += context.decode(None)
            except av.error.FFmpegError:
                continue
            yield from (f for f in frames if f.pts is not None and not f.is_corrupt)
            if single:
                return

    def _packets(self, key: int, latest: float) -> Iterator[Packet]:
        """Packets from a keyframe on that is shown before `latest`.

        That may be the one before `key`: the index can be some frames off, as can a seek. What a
        coarse seek gives before the keyframe is passed over.
        """
        index = self._index
        for goal in dict.fromkeys((key, max(0, key - 1), 0)):
            started = False
            self._fed.clear()
            try:
                self._video.container.seek(int(index.seeks[goal]), stream=self._stream)
                for packet in self._video.container.demux(self._stream):
                    if self._stop():
                        return
                    if not started:
                        time = packet.dts if packet.pts is None else packet.pts
                        early = time is None or time < index.keys[goal] - index.slack
                        if early or not packet.is_keyframe:
                            continue
                        if index.seconds(time) >= latest and goal > 0:
                            break
                        started = True
                    if packet.pts is not None and not packet.is_discard:
                        heapq.heappush(self._fed, index.seconds(packet.pts))
                    yield packet
            except av.error.FFmpegError:
                pass  # what was read so far counts, or the next goal is tried
            if started:
                return


def to_rgb(
    scaler: VideoReformatter, frame: VideoFrame, aspect: Fraction | None, max_side: int
) -> np.ndarray:
    """(height, width, 3) uint8 as stored, not yet upright; 1.6 ms from 1280x720 to 640x360."""
    width, height = fitted_size(frame.width, frame.height, aspect, max_side)
    # Files that do not say so mean BT.709 when they are high definition, as players assume.
    untold = frame.colorspace == UNSPECIFIED and max(frame.width, frame.height) >= 1280
    scaled = scaler.reformat(
        frame,
        width,
        height,
        "rgb24",
        src_colorspace=Colorspace.ITU709 if untold else None,
        interpolation="BICUBIC",
        threads=1,
    )
    return scaled.to_ndarray()
