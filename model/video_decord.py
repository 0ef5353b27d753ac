"""The same frames by way of decord, for comparison and for those who prefer it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from model.types import Frame, InputError, StopCheck, Stopped
from model.video_container import CODECS, OpenVideo, Orientation
from model.video_decoders import available_cores, fitted_size, windows
from model.video_index import any_frame, build_index

if TYPE_CHECKING:
    import decord

Result = TypeVar("Result")
DECORD_CODECS = ("h264", "hevc", "vp8", "vp9", "mpeg4")  # decord 0.6.0 finds no stream in AV1


class DecordSource:
    """Iterates over the frames of one file for increasing `times`, by way of decord.

    decord decodes every frame from the last keyframe to the wanted one. It stands mp4 and mov
    pictures upright itself but no others, and knows no pixel shapes; those are read by PyAV,
    which also checks the file first.
    """

    strategy = "decord"

    def __init__(
        self, path: str | Path, times: Sequence[float], max_side: int, stop: StopCheck
    ) -> None:
        self.path, self.max_side, self.stop = path, max_side, stop
        self.times = [float(time) for time in times]
        self.failed = 0  # desired times whose frames did not decode

    def __iter__(self) -> Iterator[Frame]:
        with OpenVideo(self.path, self.stop) as video:
            codec = CODECS.get(video.stream.codec_context.name)
            if codec not in DECORD_CODECS:
                raise InputError(f"decord cannot read {codec} video; choose the decoder pyav.")
            first = any_frame(video, build_index(video, self.stop), self.stop)
            aspect = video.stream.sample_aspect_ratio
            turns_itself = video.container.format.name.startswith("mov")
        orientation = Orientation.of(first)
        size = fitted_size(first.width, first.height, aspect, self.max_side)
        if turns_itself:
            size = size[::-1] if orientation.transpose else size
            orientation = Orientation()
        reader = self._open(size)
        shown = reader.get_frame_timestamp(np.arange(len(reader)))[:, 0]
        shown = shown - shown[0]
        if np.any(np.diff(shown) <= 0):
            raise InputError("decord finds no usable times in this file; choose the decoder pyav.")
        for i, at in self._choose(shown):
            image = self._unless_stopped(lambda at=at: reader[at].asnumpy())
            if isinstance(image, Exception):
                self.failed += 1
            else:
                yield Frame(i, float(shown[at]), orientation.apply(image))

    def _open(self, size: tuple[int, int]) -> decord.VideoReader:
        import decord

        reader = self._unless_stopped(
            lambda: decord.VideoReader(
                str(self.path),
                decord.cpu(0),
                width=size[0],
                height=size[1],
                num_threads=available_cores(),
            )
        )
        if isinstance(reader, Exception):
            raise InputError("decord cannot open this file; choose the decoder pyav.")
        return reader

    def _unless_stopped(self, call: Callable[[], Result]) -> Result | Exception:
        """The result of a call into decord, or its error.

        Such a call cannot be interrupted, so it runs in a thread that a stop leaves behind.
        """
        results: list[Result | Exception] = []

        def work() -> None:
            try:
                results.append(call())
            except Exception as error:  # handed to the thread that waits
                results.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        while thread.is_alive():
            if self.stop():
                raise Stopped
            thread.join(0.05)
        return results[0]

    def _choose(self, shown: np.ndarray) -> Iterator[tuple[int, int]]:
        """(index of a desired time, index of its frame), no frame twice."""
        low, high = windows(self.times)
        used = -1
        for i, want in enumerate(self.times):
            after = int(np.searchsorted(shown, want, "right"))
            at = min(
                (k for k in (after - 1, after) if 0 <= k < len(shown)),
                key=lambda k: abs(shown[k] - want),
            )
            if not low[i] <= shown[at] < high[i]:
                at = max(0, after - 1)  # the picture on screen
            if at > used:
                used = at
                yield i, at
