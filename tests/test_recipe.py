"""The bundled model by one command: its parts fit together, and a break loses nothing."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

from model.loading import load
from model.training import recipe as whole
from model.training.bundled import Trainer
from model.training.place_path import PlacesTrainer
from model.training.release import release
from model.training.time_path import TimesTrainer
from tests.small_recipe import few_scenes, write_encoder

TRAINERS = {
    "model.training.bundled": Trainer,
    "model.training.place_path": PlacesTrainer,
    "model.training.time_path": TimesTrainer,
}


class Python:
    """Runs a part's command right here, on a few scenes; `broken`: the modules that fail."""

    def __init__(self, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.out, self.monkeypatch = out, monkeypatch
        self.ran: list[str] = []
        self.spread: list[str] = []
        self.broken: set[str] = set()
        self.variables: dict[str, str] = {}

    def run(self, command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess:
        self.variables = env
        words = command[command.index("-m") + 1 :]
        if words[0] == "torch.distributed.run":
            self.spread, words = words[1 : words.index("--")], words[words.index("--") + 1 :]
        module, *options = words
        self.ran.append(module)
        if module in self.broken:
            return subprocess.CompletedProcess(command, 3)
        out = Path(options[options.index("--out") + 1])
        if module == "model.training.encoder":
            write_encoder(out)
        else:
            out.mkdir(exist_ok=True)
            options += ["--scenes", "60", "--processes", "1", "--steps", "1"]
            few_scenes(self.out, self.monkeypatch, *options, trainer=TRAINERS[module]).run()
        return subprocess.CompletedProcess(command, 0)


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Python:
    monkeypatch.setattr("model.training.paths.BATCHES", 30)
    monkeypatch.setattr("model.training.paths.LEVEL", 3)
    made = Python(tmp_path, monkeypatch)
    monkeypatch.setattr(whole.subprocess, "run", made.run)
    return made


def test_one_command_makes_a_model_and_goes_on_after_a_break(
    python: Python, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = whole.arguments(["--out", str(tmp_path), "--cpu", "--seed", "5"])
    python.broken = {"model.training.place_path"}
    with pytest.raises(SystemExit, match="'places' ended with exit code 3"):
        whole.run(args)
    assert python.ran == ["model.training.encoder", *list(TRAINERS)[:2]]
    assert python.spread == ["--standalone", "--nproc-per-node", str(args.processes), "-m"]
    told = json.loads((tmp_path / "recipe.json").read_text())
    assert [part["done"] for part in told["parts"].values()] == [True, True, False]

    python.broken, python.ran = set(), []
    whole.run(args)
    assert python.ran == list(TRAINERS)[1:]
    told = json.loads((tmp_path / "recipe.json").read_text())
    assert list(told["parts"]) == ["encoder", "base", "places", "times"] and told["machine"]
    assert all(part["done"] for part in told["parts"].values())
    assert "--seed 5" in told["parts"]["times"]["command"]

    python.ran = []
    whole.run(args)
    assert python.ran == [] and str(tmp_path / "times" / "model") in capsys.readouterr().out
    base, places, times = (
        load_file(tmp_path / name / "model" / "model.safetensors")
        for name in ("base", "places", "times")
    )
    assert below_the_last(base, places) and below_the_last(places, times)
    release(tmp_path / "times" / "model", tmp_path / "released")
    assert load(str(tmp_path / "released")).info.trained


def below_the_last(before: dict, after: dict) -> set[str]:
    """Where a path was written: weights that changed, without the last layer, which is trained."""
    assert before.keys() == after.keys()
    changed = {name for name in before if not before[name].equal(after[name])}
    below = {name for name in changed if ".layers.5." not in name}
    assert {name.split(".")[-2] for name in below} <= {"q_proj", "v_proj", "o_proj"}
    return below


def test_a_base_of_one_process_is_started_alone(tmp_path: Path) -> None:
    args = whole.arguments(["--out", str(tmp_path), "--processes", "1", "--minutes", "7"])
    base = whole.parts(args)[1].command
    assert base[0] == "model.training.bundled" and base[-2:] == ("--minutes", "7.0")
    with pytest.raises(SystemExit):
        whole.arguments(["--out", str(tmp_path), "--processes", "0"])


def test_on_a_cpu_the_parts_run_with_jemalloc_where_it_is_installed(
    python: Python, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.setattr(whole.sys, "platform", "linux")
    python.broken = {"model.training.encoder"}
    args = whole.arguments(["--out", str(tmp_path), "--cpu"])
    monkeypatch.setattr(whole, "find_library", lambda name: f"lib{name}.so.9")
    with pytest.raises(SystemExit):
        whole.run(args)
    assert python.variables["LD_PRELOAD"] == "libjemalloc.so.9"
    assert python.variables.keys() >= whole.os.environ.keys()

    monkeypatch.setattr(whole, "find_library", lambda name: None)
    with pytest.raises(SystemExit):
        whole.run(args)
    assert "LD_PRELOAD" not in python.variables
    assert "apt-get install libjemalloc2" in capsys.readouterr().out
    monkeypatch.setattr(whole, "find_library", lambda name: "unused")
    assert whole.environment(cpu=False) == dict(whole.os.environ)
    monkeypatch.setenv("LD_PRELOAD", "libown.so")
    assert whole.environment(cpu=True)["LD_PRELOAD"] == "libown.so"
