"""The running app from outside: named endpoints, our own addresses, the page process."""

from __future__ import annotations

import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from tests.app_server import ROOT, App, fetch, running_app
from tests.fake_engine import LAYERS


@pytest.fixture
def client(fake_app: App) -> Client:
    return Client(fake_app.url, verbose=False)


def until(job: object, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, job
        time.sleep(0.02)


def test_the_readmes_client_works_as_printed(fake_app: App) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (printed,) = re.findall(r"^```python\n(from gradio_client.*?)^```$", readme, re.DOTALL | re.M)
    assert sum(1 for line in printed.splitlines() if line) == 5
    script = printed.replace("http://127.0.0.1:7860", fake_app.url)
    assert script != printed
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert "You asked:" in run.stdout


def test_a_client(client: Client, videos: dict[str, Path]) -> None:
    added = client.predict(handle_file(videos["av1"]), api_name="/add_video")
    assert (added["title"], added["codec"]) == (videos["av1"].name, "av1")
    job = client.submit("What is it?", api_name="/ask")
    told = job.result(60)
    assert told["answer"].startswith("You asked: What is it?")
    assert told["tokens"] == {"original": 9408, "pooled": 48, "text": 20, "generated": 12}
    assert len(told["attention"]["t2v"]) == len(LAYERS)
    assert len(told["attention"]["times"]) == len(told["frame_times"]) == 48
    assert not told["memory_reused"]
    streamed = [one["answer"] for one in job.outputs()]
    assert streamed == sorted(streamed, key=len)
    assert client.predict("And then?", api_name="/ask")["memory_reused"]


def test_samples_have_names(client: Client) -> None:
    with pytest.raises(AppError, match="The samples are: "):
        client.predict("No such", api_name="/add_sample")
    assert client.predict("Forty seconds", api_name="/add_sample")["duration"] > 30


def test_stop(client: Client, videos: dict[str, Path]) -> None:
    client.predict(handle_file(videos["h264"]), api_name="/add_video")
    job = client.submit("slow", api_name="/ask")
    until(job, lambda: any(one["answer"] for one in job.outputs()))
    assert client.predict(api_name="/stop") is True
    assert job.result(60)["stopped"]
    assert client.predict(api_name="/stop") is False
    assert client.predict("Quick?", api_name="/ask")["answer"].startswith("You asked: Quick?")


def test_problems_are_sentences(client: Client, videos: dict[str, Path]) -> None:
    with pytest.raises(AppError, match="Choose a sample or upload a video first"):
        client.predict("What?", api_name="/ask")
    for kind, said in (("empty", "empty"), ("text", "not a video"), ("truncated", "cut off")):
        with pytest.raises(AppError, match=said):
            client.predict(handle_file(videos[kind]), api_name="/add_video")
    client.predict(handle_file(videos["h264"]), api_name="/add_video")
    with pytest.raises(AppError, match="Type a question first"):
        client.predict(" ", api_name="/ask")
    with pytest.raises(AppError, match="failed on this question"):
        client.predict("broken", api_name="/ask")


def test_every_endpoint_is_named_typed_and_documented(client: Client) -> None:
    told = client.view_api(return_format="dict")["named_endpoints"]
    assert set(told) == {
        "/add_video", "/add_video_url", "/add_sample", "/ask", "/maps", "/savings", "/stop",
    }  # fmt: skip
    for name, endpoint in told.items():
        assert endpoint["description"], name
        for argument in endpoint["parameters"]:
            kind = argument["python_type"]
            assert kind["type"] != "Any", (name, argument)
            assert kind["description"] and "FileData" not in kind["description"], (name, argument)
        assert endpoint["returns"][0]["python_type"]["description"], name
    numbers = {one["parameter_name"]: one for one in told["/ask"]["parameters"]}
    assert numbers["max_frames"]["python_type"]["type"] == "int"
    assert numbers["max_frames"]["parameter_default"] == 0


def test_frames_of_one_question_are_chosen_and_clamped(client: Client) -> None:
    client.predict("Forty seconds", api_name="/add_sample")
    few = client.predict("What?", max_frames=5, api_name="/ask")
    assert len(few["frame_times"]) == 5 and few["notices"] == []
    many = client.predict("What?", max_frames=10**9, api_name="/ask")
    assert many["notices"] == ["The number of frames became 4096; 1 to 4096 can be chosen here."]
    assert len(client.predict("What?", api_name="/ask")["frame_times"]) == 48
    with pytest.raises(AppError, match="8 is not"):
        client.predict("What?", tokens_per_frame=8, api_name="/ask")
    for wrong in (-1, "7", 1.5, True, None):
        with pytest.raises(AppError, match="max_frames must be a whole number from 0 on"):
            client.predict("What?", max_frames=wrong, api_name="/ask")


def test_maps_of_the_last_answer(client: Client) -> None:
    client.predict("Forty seconds", api_name="/add_sample")
    with pytest.raises(AppError, match="no answer yet"):
        client.predict(api_name="/maps")
    answer = client.predict("What is it?", api_name="/ask")
    maps = client.predict("t2v", api_name="/maps")
    assert maps["layers"] == list(LAYERS) and maps["times"] == answer["frame_times"]
    assert len(maps["tokens"]) == answer["tokens"]["generated"]
    one = client.predict("t2v", token=2, api_name="/maps")
    for rows in (maps["rows"], one["rows"]):
        assert all(len(row) == 48 for row in rows)
    assert one["rows"] != maps["rows"]
    for arguments, said in (
        ({"kind": "all"}, "no map of kind 'all'"),
        ({"kind": "t2v", "token": 999}, "token must be -1 to"),
        ({"kind": "t2v", "head": -2}, "head must be -1 to"),
    ):
        with pytest.raises(AppError, match=said):
            client.predict(**arguments, api_name="/maps")


@pytest.mark.bundled
def test_maps_are_those_of_the_model(bundled_app: App) -> None:
    client = Client(bundled_app.url, verbose=False)
    client.predict("Forty seconds", api_name="/add_sample")
    answer = client.predict("Is there an elephant?", max_frames=16, api_name="/ask")
    maps = client.predict("t2v", api_name="/maps")
    assert maps["exact"] and maps["measure"] == "share"
    for row, told in zip(maps["rows"], answer["attention"]["t2v"], strict=True):
        assert row == pytest.approx(told, abs=2e-3)
        assert sum(row) == pytest.approx(1, abs=0.01)
    of_heads = [client.predict("t2v", head=h, api_name="/maps")["rows"] for h in range(3)]
    for layer, row in enumerate(maps["rows"]):
        mean = [sum(head[layer][t] for head in of_heads) / 3 for t in range(16)]
        assert mean == pytest.approx(row, abs=2e-3)
    own = client.predict("self", api_name="/maps")
    assert len(own["rows"]) == len(own["layers"]) > len(maps["layers"])
    assert all(0 <= sum(row) < 1.001 for row in own["rows"])  # the rest lies on text


def test_savings_of_a_turn_and_the_conversation(client: Client) -> None:
    client.predict("Forty seconds", api_name="/add_sample")
    with pytest.raises(AppError, match="no answer yet"):
        client.predict(api_name="/savings")
    for question in ("One?", "Two?"):
        client.predict(question, api_name="/ask")
    saved = client.predict(api_name="/savings")
    assert (saved["turn"]["questions"], saved["conversation"]["questions"]) == (1, 2)
    ours = saved["turn"]["systems"]["crosslmm"]
    assert ours["measured"]["seconds"] > 0
    assert saved["turn"]["systems"]["llava-onevision"]["measured"] is None
    assert saved["run_card"]["video"]["sample"] == "short"
    assert set(saved["curves"]) == {"crosslmm", "unpooled", "llava-onevision"}


def test_a_session_can_be_handed_on_by_name(fake_app: App) -> None:
    one, other = (Client(fake_app.url, verbose=False) for _ in range(2))
    name = one.predict("Forty seconds", api_name="/add_sample")["session"]
    assert other.predict("Whose?", session=name, api_name="/ask")["answer"]
    assert one.predict(api_name="/savings")["conversation"]["questions"] == 1
    with pytest.raises(AppError, match="This session is over or was never there"):
        other.predict("Whose?", session="guessed", api_name="/ask")


def test_a_web_address_of_this_machine_is_refused(client: Client, fake_app: App) -> None:
    for url in (fake_app.url, "http://169.254.169.254/", "http://localhost/a.mp4"):
        with pytest.raises(AppError, match="please upload the file instead"):
            client.predict(url, api_name="/add_video_url")
    assert client.predict("Forty seconds", api_name="/add_sample")["codec"]


def test_two_clients_do_not_share_a_video(fake_app: App, videos: dict[str, Path]) -> None:
    one, other = (Client(fake_app.url, verbose=False) for _ in range(2))
    one.predict(handle_file(videos["h264"]), api_name="/add_video")
    with pytest.raises(AppError, match="first, then ask"):
        other.predict("What?", api_name="/ask")


def test_videos_are_served_by_token_in_parts(fake_app: App) -> None:
    page = fetch(fake_app.url).decode()
    token = page.split("media/")[1].split(".jpg")[0] + ".jpg"
    request = urllib.request.Request(
        fake_app.url + "media/" + token, headers={"Range": "bytes=0-99"}
    )
    with urllib.request.urlopen(request, timeout=30) as reply:
        assert (reply.status, len(reply.read())) == (206, 100)
        assert reply.headers["Content-Type"] == "image/jpeg"
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
    for guess in ("nothing", "..%2f..%2fapp.py", token[:-5]):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            fetch(fake_app.url + "media/" + guess)


def test_the_page_process_holds_no_torch(fake_app: App) -> None:
    maps = Path(f"/proc/{fake_app.process.pid}/maps").read_text()
    assert "/numpy/" in maps
    assert "/torch/" not in maps


def test_the_page_answers_before_the_model_is_loaded_and_within_five_seconds() -> None:
    before = time.monotonic()
    subprocess.run([sys.executable, "-c", "import gradio"], check=True)
    import_seconds = time.monotonic() - before  # says how busy this machine is
    with running_app(FAKE_LOAD_SECONDS="600") as app:
        assert app.health()["state"] == "loading"
        assert app.answered - app.started < max(5.0, 3 * import_seconds)


def test_a_signal_ends_the_page_and_its_worker() -> None:
    with running_app() as app:
        app.wait_for("ready")
        children = psutil.Process(app.process.pid).children(recursive=True)
        assert children
        app.process.terminate()
        assert app.process.wait(30) == 0
    _, alive = psutil.wait_procs(children, 30)
    assert not alive


def test_a_port_in_use_is_told_in_a_sentence(fake_app: App) -> None:
    port = fake_app.url.rstrip("/").rsplit(":", 1)[1]
    run = subprocess.run(
        [sys.executable, "app.py", "--port", port, "--engine", "tests.fake_engine:FakeEngine"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 1
    assert "The page cannot be served" in run.stderr
    assert "Traceback" not in run.stderr
