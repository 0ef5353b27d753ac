"""Starting for the public: a tunnel that cannot be made, a login, an extra that is missing."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error

import pytest

from app import run
from tests.app_server import FAKE, ROOT, fetch, free_port, running_app

NOWHERE = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}


def test_a_tunnel_that_cannot_be_made_is_told_and_the_page_goes_on() -> None:
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "app.py", "--share", "--port", str(port), "--engine", FAKE],
        cwd=ROOT,
        env={**os.environ, **NOWHERE},  # no tunnel, whatever network this machine has
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        told = []
        for line in process.stderr:
            told.append(line)
            if "event=page_ready" in line:
                break
        assert any("the tunnel for --share could not be made" in line for line in told)
        assert b"CrossLMM" in fetch(f"http://127.0.0.1:{port}/")
    finally:
        process.terminate()
        process.communicate(timeout=60)


def test_with_auth_nobody_asks_without_logging_in() -> None:
    with (
        running_app("--auth", "ann:secret") as app,
        pytest.raises(urllib.error.HTTPError, match="401"),
    ):
        fetch(app.url + "gradio_api/info")


def test_a_missing_extra_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    assert run.run(["--mcp"]) == 2
    assert "pip install 'gradio[mcp]'" in capsys.readouterr().err
