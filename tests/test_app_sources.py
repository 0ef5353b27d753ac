from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from app.settings import Settings
from app.sources import SAMPLES, clean_title, list_samples, take_sample, take_upload
from model.types import InputError

SETTINGS = Settings()


@pytest.mark.parametrize("kind", ["h264", "av1"])
def test_an_upload_gets_a_name_of_ours_in_the_visitors_folder(
    kind: str, videos: dict[str, Path], tmp_path: Path
) -> None:
    video = take_upload(videos[kind], tmp_path, SETTINGS)
    assert video.path.parent == tmp_path
    assert video.path.stem != videos[kind].stem
    assert video.path.read_bytes() == videos[kind].read_bytes()
    assert video.title == videos[kind].name
    assert video.info.codec == kind
    assert video.info.duration == pytest.approx(6, abs=0.1)
    assert not video.shared


def test_an_upload_is_copied_where_it_cannot_be_linked(
    videos: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("another disk")

    monkeypatch.setattr(os, "link", refuse)
    video = take_upload(videos["h264"], tmp_path, SETTINGS)
    assert video.path.read_bytes() == videos["h264"].read_bytes()


@pytest.mark.parametrize("kind", ["empty", "text", "truncated"])
def test_what_is_not_a_video_is_refused_in_one_sentence(
    kind: str, videos: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError) as refused:
        take_upload(videos[kind], tmp_path, SETTINGS)
    message = str(refused.value)
    assert message.startswith("The file") and message.endswith(".")
    assert "\n" not in message and str(videos[kind].parent) not in message
    assert list(tmp_path.iterdir()) == []


def test_limits(videos: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at most 1 KB"):
        take_upload(videos["h264"], tmp_path, Settings(max_upload_bytes=1000))
    with pytest.raises(InputError):
        take_upload(videos["h264"], tmp_path, Settings(max_video_seconds=3))
    with pytest.raises(InputError, match="did not arrive"):
        take_upload(tmp_path / "gone.mp4", tmp_path, SETTINGS)


def test_the_suffix_of_an_upload_is_one_that_we_serve(
    videos: dict[str, Path], tmp_path: Path
) -> None:
    odd = tmp_path / "page.html"
    odd.write_bytes(videos["h264"].read_bytes())
    folder = tmp_path / "visitor"
    folder.mkdir()
    assert take_upload(odd, folder, SETTINGS).path.suffix == ".mp4"


def test_titles_are_short_and_printable() -> None:
    assert clean_title("a\x00b\u202ec.mp4") == "abc.mp4"
    assert clean_title("\n") == "video"
    assert len(clean_title("x" * 300)) == 80


def test_no_listing_means_no_samples(tmp_path: Path) -> None:
    assert list_samples(tmp_path) == ()


def test_samples_without_their_file_are_left_out(videos: dict[str, Path], tmp_path: Path) -> None:
    os.link(videos["h264"], tmp_path / "here.mp4")
    entries = [
        {"file": "here.mp4", "title": "Here", "duration": 6, "questions": [{"question": "What?"}]},
        {"file": "gone.mp4", "title": "Gone", "duration": 6, "questions": []},
    ]
    (tmp_path / "samples.json").write_text(json.dumps(entries))
    (sample,) = list_samples(tmp_path)
    assert (sample.title, sample.questions, sample.poster) == ("Here", ("What?",), None)
    video = take_sample(sample, SETTINGS)
    assert video.path == sample.path
    assert video.shared


def test_the_samples_of_the_repository_can_be_used() -> None:
    samples = list_samples()
    assert len(samples) == len(json.loads((SAMPLES / "samples.json").read_text()))
    assert any(sample.duration >= 300 for sample in samples)
    for sample in samples:
        video = take_sample(sample, SETTINGS)
        assert video.info.duration == pytest.approx(sample.duration, abs=1)
        assert video.questions
        assert sample.poster is not None
