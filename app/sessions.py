"""What belongs to one visitor, and its end.

A visitor is a browser tab, known by the session hash that Gradio sends with every call.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hmac import compare_digest
from pathlib import Path
from typing import Any, Literal

from app.choices import Choices
from app.disk import Disk
from app.filmstrip import Filmstrip
from app.jobs import Job
from app.logs import log
from app.looking import Looking
from app.moments import Moment
from app.settings import Settings
from app.sources import Video
from model.types import Answer, AskRequest

Outcome = Literal["running", "answered", "stopped", "failed"]

_LOOK_SECONDS = 5.0
_EARLY_SECONDS = 3600.0


@dataclass
class Turn:
    """A question and what came of it."""

    question: str
    answer: str = ""
    outcome: Outcome = "running"
    problem: str = ""  # why it failed, one sentence
    result: Answer | None = field(default=None, compare=False)  # older ones without attention
    request: AskRequest | None = field(default=None, compare=False)  # to ask it again, changed
    seen: Moment | None = None  # where its words looked, when that is pronounced


@dataclass
class Visit:
    """An earlier video of a visitor's, with the conversation about it."""

    video: Video
    media: str
    turns: list[Turn]
    strip: Filmstrip


@dataclass
class Session:
    """One visitor: a folder, the current video and the conversation about it."""

    id: str
    folder: Path
    video: Video | None = None
    media: str = ""  # token under which the player gets the video
    turns: list[Turn] = field(default_factory=list)
    job: Job | None = None
    looking: Looking = field(default_factory=Looking)  # what the attention panel shows
    replacing: bool = False  # the next question takes the place of the last one
    earlier: list[Visit] = field(default_factory=list)  # latest first
    strip: Filmstrip = field(default_factory=Filmstrip)  # of the current video
    remark: str = ""  # told beside the running turn's own progress
    choices: Choices = Choices()
    name: str = field(default_factory=lambda: secrets.token_urlsafe(18))  # for programs' calls
    export: str = field(default_factory=lambda: secrets.token_urlsafe(18))  # guards the exports
    last_seen: float = field(default_factory=time.monotonic)
    left_at: float | None = None
    early: bool = False  # began soon after the app did: the page may be older than both

    def history(self, most: int) -> tuple[tuple[str, str], ...]:
        """Earlier questions that were answered to the end, oldest first."""
        answered = [turn for turn in self.turns if turn.outcome == "answered"]
        kept = answered[len(answered) - min(most, len(answered)) :]
        return tuple((turn.question, turn.answer) for turn in kept)

    def answers(self) -> list[Answer]:
        """What the model said in this conversation, oldest first."""
        return [turn.result for turn in self.turns if turn.result is not None]

    def last_answer(self) -> Answer | None:
        """What the panels show: the answer to the last question, with its attention."""
        return self.turns[-1].result if self.turns else None

    def conversations(self) -> list[list[Turn]]:
        """The turns about each video of the visit, the current one first."""
        return [self.turns, *(visit.turns for visit in self.earlier)]

    def thin_out(self, most: int) -> None:
        """Keep the attention of `most` answers of the visit: that of a long one fills megabytes.

        Those about the current video come first, then those about the latest of the others. Of
        answers that are not the last about their video, only sums of costs are shown. All about
        one video share its pictures.
        """
        kept = 0
        for turns in self.conversations():
            after: Answer | None = None
            for turn in reversed(turns):
                if turn.result is None:
                    continue
                kept += turn.result.attention is not None
                turn.result = after = _thinned(turn.result, kept > most, after)

    def map_bytes(self) -> int:
        """Bytes of the attention that is kept."""
        found = [
            turn.result.attention
            for turns in self.conversations()
            for turn in turns
            if turn.result is not None and turn.result.attention is not None
        ]
        pictures = {id(one.pictures): one.pictures for one in found}
        return sum(one.nbytes for one in found) + sum(
            len(jpeg) for shared in pictures.values() for jpeg in shared
        )

    def begin_anew(self) -> None:
        """Forget the conversation about the current video."""
        self.turns, self.replacing, self.remark = [], False, ""

    def videos(self) -> list[Video]:
        """All of this visit, the current one first."""
        current = [self.video] if self.video is not None else []
        return current + [visit.video for visit in self.earlier]

    def stop(self) -> bool:
        """Stop the running job, if there is one."""
        job = self.job
        if job is None or job.done:
            return False
        job.cancel()
        return True


def _thinned(answer: Answer, drop: bool, after: Answer | None) -> Answer:
    """An answer without its maps, or with the pictures of the next one about the same video."""
    changes: dict[str, Any] = {}
    if after is not None and answer.savings.crosslmm.curve:
        changes["savings"] = answer.savings.without_curves()
    attention = answer.attention
    if attention is not None and drop:
        changes["attention"] = None
    elif attention is not None and after is not None and after.attention is not None:
        pictures = after.attention.pictures
        if attention.pictures is not pictures and attention.pictures == pictures:
            changes["attention"] = replace(attention, pictures=pictures)
    return replace(answer, **changes) if changes else answer


class Sessions:
    """All visitors. `forget` is told each video that is deleted."""

    def __init__(self, settings: Settings, forget: Callable[[str], None]) -> None:
        self._settings = settings
        self._forget = forget
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._by_key: dict[str, Session] = {}
        self._media: dict[str, Path] = {}
        if settings.data_dir is not None:
            Path(settings.data_dir).mkdir(parents=True, exist_ok=True)
        self.root = Path(tempfile.mkdtemp(prefix="crosslmm-", dir=settings.data_dir))
        self.disk = Disk(self.root, settings.max_disk_bytes, settings.upload_age_seconds)
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="crosslmm-sessions", daemon=True).start()

    def get(self, key: str | None) -> Session:
        """Return the visitor's session, made on the first call; without a key, always a new one."""
        key = key or secrets.token_hex(16)
        with self._lock:
            session = self._by_key.get(key)
            if session is None:
                name = secrets.token_hex(8)
                session = Session(name, self.root / name)
                session.folder.mkdir()
                session.early = session.last_seen - self._started < _EARLY_SECONDS
                self._by_key[key] = session
                log("session_started", session=name)
            session.last_seen, session.left_at = time.monotonic(), None
            crowd = len(self._by_key) - self._settings.max_visitors
        if crowd > 0:
            self._end_most_silent(lambda one: one is not session)
        return session

    def set_video(self, session: Session, video: Video) -> None:
        """Make `video` the current one; the one before it is kept aside.

        A sample that was there before comes back with its conversation.
        """
        if session.video is not None and session.video.path == video.path:
            session.stop()
            session.begin_anew()
            return
        before = next((one for one in session.earlier if one.video.path == video.path), None)
        self._show(session, before or Visit(video, self.publish(video.path), [], Filmstrip()))

    def go_back(self, session: Session, media: str) -> bool:
        """Make an earlier video of the visit the current one; False when it is no longer there."""
        before = next((one for one in session.earlier if one.media == media), None)
        if before is not None:
            self._show(session, before)
        return before is not None

    def _show(self, session: Session, visit: Visit) -> None:
        session.stop()
        if session.video is not None:
            aside = Visit(session.video, session.media, session.turns, session.strip)
            session.earlier.insert(0, aside)
        session.earlier = [one for one in session.earlier if one is not visit]
        session.begin_anew()
        session.video, session.media = visit.video, visit.media
        session.turns, session.strip = visit.turns, visit.strip
        while len(session.earlier) >= self._settings.max_visit_videos:
            self._drop(session.earlier.pop())

    def publish(self, path: Path) -> str:
        """Make a file reachable for the player under a token that cannot be guessed."""
        token = secrets.token_urlsafe(18) + path.suffix
        with self._lock:
            self._media[token] = path
        return token

    def media(self, token: str) -> Path | None:
        """Return the file behind a token."""
        with self._lock:
            return self._media.get(token)

    def by_name(self, name: str) -> Session | None:
        """Return the session that a program calls by its name."""
        with self._lock:
            for session in self._by_key.values():
                if secrets.compare_digest(session.name.encode(), name.encode()):
                    session.last_seen, session.left_at = time.monotonic(), None
                    return session
        return None

    def by_export(self, token: str) -> Session | None:
        """Return the session whose exports lie under a token."""
        with self._lock:
            every = list(self._by_key.values())
        return next(
            (one for one in every if secrets.compare_digest(one.export.encode(), token.encode())),
            None,
        )

    def looking(self, token: str) -> Looking | None:
        """Return what a visitor looks at, by the token of its pictures and files."""
        with self._lock:
            every = [session.looking for session in self._by_key.values()]
        wanted = token.encode()
        return next((one for one in every if compare_digest(one.token.encode(), wanted)), None)

    def leave(self, key: str | None) -> None:
        """Note a closed page: its job stops now, the rest goes a little later (it may return)."""
        with self._lock:
            session = self._by_key.get(key or "")
        if session is not None:
            session.left_at = time.monotonic()
            session.stop()

    def close(self) -> None:
        """End every session and delete all visitors' files."""
        self._closed.set()
        for key in list(self._by_key):
            self._end(key)
        shutil.rmtree(self.root, ignore_errors=True)

    def end_expired(self) -> None:
        """End the sessions whose visitor left or has been silent too long."""
        now = time.monotonic()
        with self._lock:
            expired = [key for key, one in self._by_key.items() if self._is_over(one, now)]
        for key in expired:
            self._end(key)

    def count(self) -> int:
        """How many visitors there are."""
        with self._lock:
            return len(self._by_key)

    def limit_maps(self) -> None:
        """Drop maps while those of all visitors take too much; the most silent lose theirs first.

        Of everybody the last answer's stay while that suffices.
        """
        with self._lock:
            visitors = sorted(self._by_key.values(), key=lambda one: one.last_seen)
        sizes = {one.id: one.map_bytes() for one in visitors}
        for most in (1, 0):
            for one in visitors:
                if sum(sizes.values()) <= self._settings.all_map_bytes:
                    return
                one.thin_out(most)
                if not most:
                    one.looking.show(None, None)
                sizes[one.id] = one.map_bytes()

    def make_room(self) -> None:
        """Delete files nobody uses; then, while there are too many, those of silent visitors."""
        self.disk.tidy()
        while self.disk.over() > 0:
            if not self._end_most_silent(lambda one: any(not v.shared for v in one.videos())):
                return
            self.disk.tidy()

    def _end_most_silent(self, may_end: Callable[[Session], object]) -> bool:
        with self._lock:
            idle = [
                (one.last_seen, key)
                for key, one in self._by_key.items()
                if may_end(one) and (one.job is None or one.job.done)
            ]
        if idle:
            log("session_ended_early", visitors=self.count())
            self._end(min(idle)[1])
        return bool(idle)

    def _is_over(self, session: Session, now: float) -> bool:
        if session.job is not None and not session.job.done:
            return False
        if session.left_at is not None:
            return now - session.left_at > self._settings.session_grace_seconds
        return now - session.last_seen > self._settings.session_idle_seconds

    def _end(self, key: str) -> None:
        with self._lock:
            session = self._by_key.pop(key, None)
        if session is None:
            return
        session.stop()
        if session.video is not None:
            self._drop(Visit(session.video, session.media, session.turns, session.strip))
        for visit in session.earlier:
            self._drop(visit)
        session.video, session.media, session.earlier = None, "", []
        shutil.rmtree(session.folder, ignore_errors=True)
        log("session_ended", session=session.id)

    def _drop(self, visit: Visit) -> None:
        with self._lock:
            self._media.pop(visit.media, None)
        if not visit.video.shared:
            self._forget(str(visit.video.path))
            visit.video.path.unlink(missing_ok=True)

    def _watch(self) -> None:
        while not self._closed.wait(_LOOK_SECONDS):
            try:
                self.end_expired()
                self.limit_maps()
                self.make_room()
            except OSError as error:  # a disk that fails now may work later
                log("tidying_failed", error=type(error).__name__)
