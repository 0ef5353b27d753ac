from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.jobs import Job
from app.sessions import Session, Sessions, Turn
from app.settings import Settings
from app.sources import Video, take_upload
from model.types import AskRequest, Savings
from tests.fake_engine import savings

SETTINGS = Settings()
SAVINGS = savings(frames=8, text=20)


@pytest.fixture
def forgotten() -> list[str]:
    return []


@pytest.fixture
def sessions(forgotten: list[str], tmp_path: Path) -> Iterator[Sessions]:
    sessions = Sessions(Settings(data_dir=str(tmp_path / "data")), forgotten.append)
    yield sessions
    sessions.close()


@pytest.fixture
def added(sessions: Sessions, videos: dict[str, Path]) -> tuple[Session, Video]:
    session = sessions.get("visitor")
    video = take_upload(videos["h264"], session.folder, SETTINGS)
    sessions.set_video(session, video)
    return session, video


@dataclasses.dataclass(frozen=True)
class Maps:
    """What these tests need of an answer's attention."""

    nbytes: int = 700
    pictures: tuple[bytes, ...] = dataclasses.field(default_factory=lambda: (bytes(300),))


@dataclasses.dataclass(frozen=True)
class Result:
    """What these tests need of an answer."""

    attention: Maps | None = dataclasses.field(default_factory=Maps)
    savings: Savings = SAVINGS


def kept(turns: list[Turn]) -> list[bool]:
    return [turn.result.attention is not None for turn in turns]


def ask(session: Session, times: int) -> None:
    session.turns += [Turn("What?", "That.", "answered", result=Result()) for _ in range(times)]


def test_a_visitor_keeps_the_session_and_shares_it_with_nobody(sessions: Sessions) -> None:
    one = sessions.get("one")
    assert sessions.get("one") is one
    other = sessions.get("other")
    assert other is not one
    assert other.folder != one.folder


def test_callers_without_a_key_share_nothing(sessions: Sessions) -> None:
    assert sessions.get(None) is not sessions.get(None)
    sessions.leave(None)


def test_the_player_gets_a_video_by_its_token_only(
    sessions: Sessions, added: tuple[Session, Video]
) -> None:
    session, video = added
    assert sessions.media(session.media) == video.path
    assert video.path.stem not in session.media
    for guess in ("", video.path.name, "../" + video.path.name, session.media[:-1]):
        assert sessions.media(guess) is None


def test_an_earlier_video_can_be_gone_back_to(
    sessions: Sessions, added: tuple[Session, Video], videos: dict[str, Path], forgotten: list[str]
) -> None:
    session, video = added
    token, told = session.media, Turn("What?", "That.", "answered")
    session.turns.append(told)
    other = take_upload(videos["av1"], session.folder, SETTINGS)
    sessions.set_video(session, other)
    assert (session.turns, session.videos()) == ([], [other, video])
    assert sessions.media(token) == video.path
    assert sessions.go_back(session, token)
    assert (session.turns, session.videos()) == ([told], [video, other])
    assert not sessions.go_back(sessions.get("other"), token)  # nobody else's
    assert not sessions.go_back(session, "guess")
    assert forgotten == []


def test_maps_are_kept_of_the_current_video_first(
    sessions: Sessions, added: tuple[Session, Video], videos: dict[str, Path]
) -> None:
    session, _ = added
    ask(session, 2)
    first = list(session.turns)
    sessions.set_video(session, take_upload(videos["av1"], session.folder, SETTINGS))
    assert kept(first) == [True, True]
    ask(session, 2)
    session.thin_out(3)
    assert kept(first) == [False, True]
    assert kept(session.turns) == [True, True]
    sessions.go_back(session, session.earlier[0].media)
    session.thin_out(1)
    assert kept(session.turns) == [False, True]
    assert kept(session.earlier[0].turns) == [False, False]


def test_costs_at_other_lengths_are_kept_of_the_last_answer_only(
    added: tuple[Session, Video],
) -> None:
    session, _ = added
    ask(session, 3)
    session.thin_out(4)
    told = [turn.result.savings for turn in session.turns]
    assert [bool(one.crosslmm.curve) for one in told] == [False, False, True]
    assert all(one.without_curves() == SAVINGS.without_curves() for one in told)


def test_answers_about_one_video_share_its_pictures(added: tuple[Session, Video]) -> None:
    session, _ = added
    ask(session, 3)
    other = Result(Maps(pictures=(bytes(200),)))  # fewer frames were asked for
    session.turns[1].result = other
    assert session.map_bytes() == 3 * 700 + 2 * 300 + 200
    session.turns[1], session.turns[0] = session.turns[0], session.turns[1]
    session.thin_out(4)
    first, *same = (turn.result.attention.pictures for turn in session.turns)
    assert same[0] is same[1] and first == (bytes(200),)
    assert session.map_bytes() == 3 * 700 + 300 + 200
    assert session.turns[0].result.attention is other.attention


@pytest.mark.parametrize(
    ("most", "silent", "lively"),
    [
        (4000, [True, True], [True, True]),
        (3500, [False, True], [True, True]),
        (2500, [False, True], [False, True]),  # everybody's last one stays while that suffices
        (1500, [False, False], [False, True]),
    ],
)
def test_maps_of_all_visitors_have_a_limit_and_silent_visitors_pay_it(
    most: int, silent: list[bool], lively: list[bool], tmp_path: Path
) -> None:
    sessions = Sessions(Settings(data_dir=str(tmp_path), all_map_bytes=most), lambda _: None)
    one, other = sessions.get("one"), sessions.get("other")
    for session in (one, other):
        ask(session, 2)
        session.looking.look = session.last_answer()
    other.last_seen -= 60
    sessions.limit_maps()
    assert kept(other.turns) == silent
    assert kept(one.turns) == lively
    assert [bool(session.looking.look) for session in (other, one)] == [any(silent), True]
    sessions.close()


def test_the_oldest_video_of_a_visit_goes_first(
    sessions: Sessions, added: tuple[Session, Video], videos: dict[str, Path], forgotten: list[str]
) -> None:
    session, video = added
    token = session.media
    for _ in range(SETTINGS.max_visit_videos):
        sessions.set_video(session, take_upload(videos["av1"], session.folder, SETTINGS))
    assert len(session.videos()) == SETTINGS.max_visit_videos
    assert not video.path.exists()
    assert sessions.media(token) is None
    assert forgotten == [str(video.path)]


def test_a_sample_is_never_deleted(
    sessions: Sessions, added: tuple[Session, Video], videos: dict[str, Path], forgotten: list[str]
) -> None:
    session, video = added
    sample = dataclasses.replace(video, path=videos["h264"], shared=True)
    sessions.set_video(session, sample)
    session.turns.append(Turn("What?", "That.", "answered"))
    sessions.set_video(session, sample)  # the same again: a new start
    assert session.turns == []
    assert session.videos() == [sample, video]
    sessions.close()
    assert videos["h264"].exists()
    assert forgotten == [str(video.path)]


def test_leaving_stops_the_job_and_later_ends_the_session(
    sessions: Sessions, added: tuple[Session, Video]
) -> None:
    session, video = added
    stopped: list[Job] = []
    session.job = Job(AskRequest(str(video.path), "What?"), 1, stopped.append)
    sessions.leave("visitor")
    assert stopped == [session.job]
    sessions.end_expired()
    assert video.path.exists()  # the visitor may come back
    session.left_at = time.monotonic() - SETTINGS.session_grace_seconds - 1
    sessions.end_expired()
    assert video.path.exists()  # the job still runs
    session.job = None
    sessions.end_expired()
    assert not session.folder.exists()
    assert sessions.get("visitor") is not session


def test_coming_back_keeps_the_session(sessions: Sessions, added: tuple[Session, Video]) -> None:
    session, _ = added
    sessions.leave("visitor")
    assert sessions.get("visitor") is session
    assert session.left_at is None


def test_a_silent_visitor_is_forgotten(sessions: Sessions, added: tuple[Session, Video]) -> None:
    session, _ = added
    session.last_seen -= SETTINGS.session_idle_seconds + 1
    sessions.end_expired()
    assert not session.folder.exists()


def test_close_leaves_no_file_behind(sessions: Sessions, added: tuple[Session, Video]) -> None:
    sessions.close()
    assert not sessions.root.exists()


def test_history_holds_answered_turns_only() -> None:
    session = Session("id", Path("."))
    outcomes = ("answered", "failed", "stopped", "answered", "running")
    session.turns = [Turn(str(n), "a", outcome) for n, outcome in enumerate(outcomes)]
    assert session.history(8) == (("0", "a"), ("3", "a"))
    assert session.history(1) == (("3", "a"),)
    assert session.history(0) == ()
