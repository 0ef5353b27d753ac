"""Turns inside `spaces.GPU` calls: with a stand-in that forks as ZeroGPU does, and the package."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from app.settings import Settings
from app.zero_worker import wanted
from model.types import Answer, AskRequest
from tests.app_server import FAKE, ROOT, App, running_app

STAND_IN = Path(__file__).parent / "stand_in"
ALSO = os.pathsep.join([str(STAND_IN), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
SECONDS = 15 + 48  # until the GPU is there, and the fake's one second for each frame


@dataclasses.dataclass
class Lent:
    app: App
    folder: Path

    def calls(self) -> list[int]:
        log = self.folder / "spaces"
        return [int(line) for line in log.read_text().split()] if log.exists() else []

    def noted(self) -> list[str]:
        return (self.folder / "fake").read_text().splitlines()


@pytest.fixture(scope="module")
def lent(tmp_path_factory: pytest.TempPathFactory, gate_folder: Path) -> Iterator[Lent]:
    folder = tmp_path_factory.mktemp("lent")
    environment = {
        "PYTHONPATH": ALSO,
        "SPACES_ZERO_GPU": "true",
        "SPACES_LOG": str(folder / "spaces"),
        "FAKE_LOG": str(folder / "fake"),
        "FAKE_GATES": str(gate_folder),
    }
    with running_app(**environment) as app:
        assert app.health()["state"] == "ready"  # loaded before the page is served
        yield Lent(app, folder)


def test_a_turn_decodes_here_and_answers_on_the_lent_gpu(
    lent: Lent, videos: dict[str, Path]
) -> None:
    client = Client(lent.app.url, verbose=False)
    client.predict(handle_file(videos["h264"]), api_name="/add_video")
    before = len(lent.calls())
    first = client.predict("What is it?", api_name="/ask")
    assert first["answer"].startswith("You asked: What is it?")
    assert lent.calls()[before:] == [SECONDS]
    assert lent.noted()[-2:] == ["decode lent=no", "ask lent=yes"]
    assert client.predict("And then?", api_name="/ask")["answer"].startswith("You asked: And then?")
    assert lent.noted()[-2:] == ["ask lent=yes", "ask lent=yes"]  # not decoded again
    client.predict("Fewer?", max_frames=5, api_name="/ask")
    assert lent.calls()[-1] == 15 + 5
    assert lent.app.health()["worker"] is None


def test_what_goes_wrong_is_told_in_its_own_words(lent: Lent, videos: dict[str, Path]) -> None:
    client = Client(lent.app.url, verbose=False)
    client.predict(handle_file(videos["av1"]), api_name="/add_video")
    calls = len(lent.calls())
    with pytest.raises(AppError, match="This video cannot be decoded"):
        client.predict("undecodable", api_name="/ask")
    assert len(lent.calls()) == calls  # no GPU was asked for
    with pytest.raises(AppError, match="This question cannot be asked"):
        client.predict("wrong", api_name="/ask")
    with pytest.raises(AppError, match="The model failed on this question"):
        client.predict("broken", api_name="/ask")
    with pytest.raises(AppError, match="The GPU was taken back before the answer was there"):
        client.predict("crash", api_name="/ask")
    assert client.predict("Still there?", api_name="/ask")["answer"]


def test_stop_reaches_the_lent_process(lent: Lent, videos: dict[str, Path]) -> None:
    client = Client(lent.app.url, verbose=False)
    client.predict(handle_file(videos["h264"]), api_name="/add_video")
    job = client.submit("slow", api_name="/ask")
    while not any(one["answer"] for one in job.outputs()):
        assert not job.done()
    assert client.predict(api_name="/stop") is True
    assert job.result(60)["stopped"]
    assert client.predict("Quick?", api_name="/ask")["answer"]


def test_zerogpu_is_taken_only_in_a_zerogpu_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(STAND_IN))
    monkeypatch.delenv("SPACES_ZERO_GPU", raising=False)
    assert not wanted(Settings())
    assert wanted(Settings(worker="zerogpu"))
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    assert wanted(Settings())
    assert not wanted(Settings(worker="resident"))


@pytest.mark.skipif(
    importlib.util.find_spec("spaces") is not None, reason="the package is installed"
)
def test_a_missing_package_is_told() -> None:
    run = subprocess.run(
        [sys.executable, "app.py", "--worker", "zerogpu", "--engine", FAKE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 2
    assert "pip install spaces" in run.stderr


def test_with_the_real_package_turns_run_right_here(videos: dict[str, Path]) -> None:
    pytest.importorskip("spaces")
    with running_app("--worker", "zerogpu") as app:
        assert app.health()["state"] == "ready"
        client = Client(app.url, verbose=False)
        client.predict(handle_file(videos["h264"]), api_name="/add_video")
        assert client.predict("What is it?", api_name="/ask")["answer"].startswith("You asked:")
        with pytest.raises(AppError, match="This question cannot be asked"):
            client.predict("wrong", api_name="/ask")


@pytest.mark.bundled
def test_frames_decoded_before_give_the_same_answer(tmp_path: Path) -> None:
    from model.engine import Engine

    engine = Engine.load()
    video = str(ROOT / "assets" / "samples" / "short.mp4")
    request = AskRequest(video, engine.info.examples[0], max_frames=20)
    decoded = engine.decode(request, tmp_path)
    assert decoded.frames == decoded.asked == 20
    *_, lent = engine.ask(request, decoded=decoded)
    engine.forget(video)
    *_, usual = engine.ask(request)
    assert isinstance(lent, Answer) and lent.text == usual.text
    assert np.array_equal(lent.frame_times, usual.frame_times)
    assert lent.attention.t2v == pytest.approx(usual.attention.t2v, abs=1e-6)
    assert lent.timings.decode > 0
    few, many = (engine.model_seconds(request, frames, 1e12) for frames in (20, 200))
    assert 0 < few < many
