"""The README stays true: its tree, its commands and its pictures."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path

import yaml
from packaging.requirements import Requirement

from app.settings import Settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [body for written, body in found if written == language]


def test_every_file_of_the_tree_is_there_and_every_module_is_in_it() -> None:
    (tree,) = [block for block in blocks("") if block.startswith("app.py")]
    named, folder = set(), ""
    for line in tree.splitlines():
        names = re.findall(r"[\w*]+\.py", line)
        inside = line.startswith(" ")
        if not inside:
            folder = line.split()[0] if line.split()[0].endswith("/") else ""
        for name in names:
            pattern = folder + name if inside else name
            found = list(ROOT.glob(pattern))
            assert found, f"the tree names {pattern}, which is not there"
            named |= {path.resolve() for path in found}
    for package in ("app", "model"):
        for file in (ROOT / package).glob("*.py"):
            support = {"__init__.py", "types.py", "checkpoint_files.py", "fragments.py"}
            known = support | {"logs.py", "run.py"}
            assert file.resolve() in named or file.name in known, f"{file} is not in the tree"


def test_every_command_names_a_module_that_exists() -> None:
    modules = set(re.findall(r"python -m ([\w.]+)", README)) - {"venv"}
    assert "model.ask" in modules
    for module in modules:
        assert importlib.util.find_spec(module) is not None, module


def test_the_start_command_is_one_line_and_ci_runs_the_test_command() -> None:
    start = next(block for block in blocks("bash") if "app.py" in block)
    assert start.count("\n") == 1
    assert "requirements.txt" in start
    command = "bash tests/run.sh"
    assert any(block.strip() == command for block in blocks("bash"))
    assert command in (ROOT / ".ci" / "run").read_text()


def test_every_linked_file_is_there() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README) + re.findall(r'src="([^"]+)"', README)
    local = [link for link in links if "://" not in link]
    assert local
    for link in local:
        assert (ROOT / link).exists(), link


def test_the_front_matter_is_that_of_a_space() -> None:
    matter = yaml.safe_load(README.split("---\n")[1])
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {matter["colorFrom"], matter["colorTo"]} <= colours
    assert (matter["sdk"], matter["license"]) == ("gradio", "apache-2.0")
    assert (ROOT / matter["app_file"]).is_file()
    assert len(matter["short_description"]) <= 60
    assert matter["python_version"] in ("3.10", "3.12")  # what ZeroGPU offers
    needed = {
        requirement.name: requirement.specifier
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if (named := line.split("#")[0].strip())
        for requirement in [Requirement(named)]
    }
    assert matter["sdk_version"] in needed["gradio"]
    assert "2.11.0" in needed["torch"]  # the newest there


def test_every_option_in_a_command_is_one() -> None:
    known = {"--" + one.name.replace("_", "-") for one in dataclasses.fields(Settings)} | {"--help"}
    for line in README.splitlines():
        for command in re.findall(r"app\.py((?: --?[\w-]+(?: [^-`#\s][^\s`]*)?)+)", line):
            assert set(re.findall(r"--[\w-]+", command)) <= known, line
