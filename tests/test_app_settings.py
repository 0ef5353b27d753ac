from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from app.settings import Settings, parse_auth, parse_bytes, show_bytes
from tests.app_server import ROOT


def test_command_line_wins_over_environment_over_default() -> None:
    environ = {"CROSSLMM_MAX_FRAMES": "64", "CROSSLMM_PORT": "8000", "CROSSLMM_SHARE": "yes"}
    settings = Settings.parse(["--port", "9000"], environ)
    assert (settings.port, settings.max_frames, settings.share) == (9000, 64, True)
    assert settings.host is None
    assert not Settings.parse(["--no-share"], environ).share


def test_every_option_is_read_from_its_variable() -> None:
    read = {"auth": "a:b", "memory_budget": "1GB", "share": "1", "engine": "a:B", "port": "8000"}
    read |= {"quantization": "8bit", "kv_precision": "int8", "mcp": "yes", "worker": "zerogpu"}
    read |= {"compile_encoder": "on"}
    read |= {"log_level": "debug", "heartbeat_seconds": "0.1", "max_upload_bytes": "5"}
    for one in dataclasses.fields(Settings):
        text = read.get(one.name, "7")
        value = getattr(Settings.parse([], {f"CROSSLMM_{one.name.upper()}": text}), one.name)
        assert value == one.metadata["read"](text), one.name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "0"], "port must be between 1 and 65535, not 0"),
        (["--max-frames", "0"], "max_frames must be above 0, not 0"),
        (["--memory-budget", "lots"], "a size such as 500MB or 2GB is expected, not 'lots'"),
        (["--quantization", "3bit"], "quantization must be auto, none, 8bit or 4bit, not '3bit'"),
        (["--kv-precision", "int2"], "kv_precision must be native, int8 or int4, not 'int2'"),
        (["--pooled-grid", "0"], "pooled_grid must be above 0, not 0"),
        (["--auth", "someone"], "user:password is expected"),
        (["--engine", "nowhere"], "engine must be written module:name, not 'nowhere'"),
        (["--heartbeat-timeout-seconds", "0.1"], "must be at least twice heartbeat_seconds"),
        (["--session-idle-seconds", "nan"], "session_idle_seconds must be above 0, not nan"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        Settings.parse(arguments, {})
    assert ended.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_mistake_in_the_environment_names_the_variable(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        Settings.parse([], {"CROSSLMM_PORT": "high"})
    assert "CROSSLMM_PORT" in capsys.readouterr().err


def test_help_names_every_option() -> None:
    told = subprocess.run(
        [sys.executable, "app.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for one in dataclasses.fields(Settings):
        assert "--" + one.name.replace("_", "-") in told


def test_limits_are_tighter_when_shared_unless_given() -> None:
    alone, shared = Settings.parse([], {}), Settings.parse(["--share"], {})
    tighter = [one.name for one in dataclasses.fields(Settings) if one.metadata["shared"]]
    assert {"max_upload_bytes", "queue_size", "session_idle_seconds"} <= set(tighter)
    for name in tighter:
        assert 0 < getattr(shared, name) < getattr(alone, name), name
    environ = {"CROSSLMM_SHARE": "yes", "CROSSLMM_QUEUE_SIZE": "50"}
    given = Settings.parse(["--max-upload-bytes", "3GB"], environ)
    assert (given.queue_size, given.max_upload_bytes) == (50, 3 * 10**9)
    assert given.max_fetches == shared.max_fetches


def test_help_tells_variables_choices_and_shared_limits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        Settings.parse(["--help"], {})
    told = " ".join(capsys.readouterr().out.split())
    assert "CROSSLMM_MAX_FRAMES=64 for --max-frames 64" in told
    assert "--quantization auto|none|8bit|4bit" in told
    assert "(default: 2 GB; 500 MB with --share)" in told


def test_sizes() -> None:
    assert parse_bytes("2GB") == parse_bytes("2 gb") == 2 * 10**9
    assert parse_bytes("1.5KB") == 1500
    assert parse_bytes("12") == 12
    assert show_bytes(13_200_000) == "13.2 MB"
    assert show_bytes(999) == "999 B"


def test_passwords_may_hold_colons() -> None:
    assert parse_auth("a:b:c,d:e") == (("a", "b:c"), ("d", "e"))
