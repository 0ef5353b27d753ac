"""How soon "Where it looked" is there after an answer, and what the browser has to do for it.

    python -m tests.bench.panel [--minutes 30] [--frames 1800]

A made video, the bundled model, real headless Chromium. The second answer streams while the panel
of the first is open; the longest task of the page's thread until everything is drawn is taken from
the browser itself. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from datetime import date
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

from app.looking import Looking
from app.panels.attention import attention_panel
from model.engine import Engine
from model.types import Answer, AskRequest, Piece
from tests.app_server import running_app
from tests.browser.chat_page import ChatPage
from tests.browser.conftest import DESKTOP, QUIET
from tests.media import loop_video, make_video

QUESTIONS = ("What happens in the video?", "Is there a cat?")

_WATCH = """() => {
  window.long = [];
  window.chatChanged = window.panelChanged = 0;
  new PerformanceObserver((list) => {
    for (const entry of list.getEntries()) window.long.push(entry.duration);
  }).observe({ type: "longtask" });
  const all = { childList: true, subtree: true, characterData: true };
  const watch = (selector, name) => new MutationObserver(() => {
    window[name] = performance.now();
  }).observe(document.querySelector(selector), all);
  watch("#chat", "chatChanged");
  watch("#attention", "panelChanged");
}"""


def in_engine(path: Path, frames: int) -> dict[str, float]:
    """Seconds from the last word to the answer with its maps, and to the drawn panel."""
    engine, told = Engine.load(), {}
    for number, question in enumerate(QUESTIONS):
        said = time.perf_counter()
        for event in engine.ask(AskRequest(str(path), question, max_frames=frames)):
            if isinstance(event, Piece):
                said = time.perf_counter()
            if isinstance(event, Answer):
                mapped = time.perf_counter()
                looking = Looking()
                looking.show(event, None)
                html = attention_panel(looking.look, engine.info)
                drawn = time.perf_counter()
                sizes = {one.kind: one.nbytes for one in event.attention.maps}
                told[f"answer_{number + 1}"] = {
                    "tokens": len(event.attention.tokens),
                    "maps_seconds": round(mapped - said, 3),
                    "drawing_seconds": round(drawn - mapped, 3),
                    "html_bytes": len(html),
                    "map_bytes": sizes,
                    "picture_bytes": sum(map(len, event.attention.pictures)),
                }
    return told


def in_browser(path: Path, frames: int) -> dict[str, float]:
    """What the page's thread does while the second answer streams, the first one's panel open."""
    with (
        running_app("--max-frames", str(frames), fake=False) as app,
        sync_playwright() as playwright,
    ):
        app.wait_for("ready")
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=QUIET)
        chat = ChatPage(browser.new_page(viewport=DESKTOP), app.url).open().when_ready()
        chat.page.set_default_timeout(1_200_000)
        expect.set_options(timeout=1_200_000)
        chat.add(path)
        chat.ask(QUESTIONS[0])
        chat.answered(1)
        chat.page.evaluate(_WATCH)
        chat.ask(QUESTIONS[1])
        chat.answered(2)
        chat.page.wait_for_function("window.panelChanged > 0")
        tasks = chat.page.evaluate("window.long")
        gap = chat.page.evaluate("window.panelChanged - window.chatChanged")
        browser.close()
    return {
        "longest_task_ms": round(max(tasks, default=0.0)),
        "tasks_over_50_ms": len(tasks),
        "panel_after_last_change_of_chat_ms": round(gap),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--frames", type=int, default=1800)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        short, path = Path(folder) / "minute.mp4", Path(folder) / "long.mp4"
        make_video(short, duration=60, fps=5, size=(320, 180), gop=25)
        loop_video(short, path, max(1, round(args.minutes)))
        report = {
            "date": date.today().isoformat(),
            "processors": os.cpu_count(),
            "load_at_start": round(os.getloadavg()[0], 1),
            "minutes": args.minutes,
            "frames": args.frames,
            "engine": in_engine(path, args.frames),
            "browser": in_browser(path, args.frames),
        }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
