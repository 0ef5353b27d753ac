"""Imports point one way: app -> the plain data and the video check of model, never back."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.app_server import ROOT

# What the page process may import of model/: none of these imports torch.
PAGE_MAY_IMPORT = {"model.types", "model.video_sandbox", "model.ask"}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names.add(node.module or "")
    return names


def within(names: set[str], package: str) -> set[str]:
    return {name for name in names if name == package or name.startswith(package + ".")}


@pytest.mark.parametrize("path", sorted((ROOT / "app").rglob("*.py")), ids=lambda p: p.name)
def test_app_imports_only_plain_parts_of_model(path: Path) -> None:
    assert within(imported(path), "model") <= PAGE_MAY_IMPORT
    assert not within(imported(path), "torch") | within(imported(path), "transformers")


@pytest.mark.parametrize("path", sorted((ROOT / "model").rglob("*.py")), ids=lambda p: p.name)
def test_model_knows_nothing_of_the_app(path: Path) -> None:
    assert not within(imported(path), "app") | within(imported(path), "gradio")


def test_the_panels_and_the_chat_know_nothing_of_gradio() -> None:
    for path in [*(ROOT / "app" / "panels").glob("*.py"), ROOT / "app" / "chat.py"]:
        assert not within(imported(path), "gradio")


def test_the_page_does_not_import_torch() -> None:
    script = "import sys, app.run, app.ui; assert not {'torch', 'av'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
