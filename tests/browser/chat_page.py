"""The page as a visitor sees it: what can be done and what can be read. No sleeps."""

from __future__ import annotations

import re
from pathlib import Path

from playwright.sync_api import Locator, Page, expect

PATIENCE_MS = 120_000  # only a broken page needs them
expect.set_options(timeout=PATIENCE_MS)


class ChatPage:
    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        page.set_default_timeout(PATIENCE_MS)
        self.status = page.locator(".model-status")
        self.player = page.locator(".player video")
        self.about = page.locator(".player .about")
        self.notice = page.locator("#notice .notice")
        self.web_address = page.get_by_label("Web address of a video")
        self.fetch_button = page.get_by_role("button", name="Fetch", exact=True)
        self.cancel_button = page.get_by_role("button", name="Cancel", exact=True)
        self.line = page.locator("#line .line")
        self.chips = page.locator("#chips .chip")
        self.samples = page.locator("#samples .sample")
        self.question = page.get_by_label("Question", exact=True)
        self.ask_button = page.get_by_role("button", name="Ask", exact=True)
        self.stop_button = page.get_by_role("button", name="Stop", exact=True)
        self.answers = page.locator('#chat [data-testid="bot"]')
        self.questions = page.locator('#chat [data-testid="user"]')
        self.attention = page.locator("#panel-attention")
        self.plan = page.locator("#plan .plan")
        self.shots = page.locator(".timeline .shot")
        self.pins = page.locator(".timeline .pin")
        self.savings = page.locator("#panel-savings")
        self.rows = self.attention.locator(".cells")
        self.frames = self.attention.locator(".frame")
        self.plot = self.attention.locator(".plot")
        self.words = self.attention.locator(".answer-words button:not(.every)")
        self.cell = self.attention.locator("figure.cell")
        self.what_if = page.locator(".what-if")
        self.versus = page.locator("#panel-what-if")

    def open(self) -> ChatPage:
        self.page.goto(self.url)
        expect(self.page.get_by_role("heading", name="CrossLMM Chat")).to_be_visible()
        return self

    def when_ready(self) -> ChatPage:
        expect(self.status).to_have_attribute("data-state", re.compile("ready|busy"))
        return self

    def upload(self, path: Path) -> None:
        self.page.locator('#upload input[type="file"]').set_input_files(path)

    def add(self, path: Path) -> None:
        self.upload(path)
        expect(self.about).to_contain_text(path.name)

    def choose_another(self) -> None:
        """Show where videos come from, which is hidden while there is one."""
        expect(self.page.locator("#talk")).to_be_visible()
        if self.player.count():
            self.page.get_by_role("button", name="New video").click()

    def pick_sample(self, number: int) -> str:
        self.choose_another()
        title = self.samples.nth(number).locator(".sample-name").inner_text()
        self.samples.nth(number).click()
        expect(self.about).to_contain_text(title)
        return title

    def ask(self, question: str) -> None:
        self.question.fill(question)
        self.question.press("Enter")

    def answered(self, count: int) -> Locator:
        """Wait for the end of turn `count` and return its answer."""
        expect(self.line).to_have_class(re.compile("line-done"))
        expect(self.answers).to_have_count(count)
        expect(self.ask_button).to_be_visible()
        return self.answers.nth(count - 1)

    def click_word(self, answer: int, word: str) -> None:
        """Click a word in the middle of the text of an answer, counted from 1."""
        said = self.answers.nth(answer - 1)
        said.scroll_into_view_if_needed()
        place = said.evaluate(
            """(said, word) => {
                const walker = document.createTreeWalker(said, NodeFilter.SHOW_TEXT);
                while (walker.nextNode()) {
                    const start = walker.currentNode.data.indexOf(word);
                    if (start < 0) continue;
                    const range = document.createRange();
                    range.setStart(walker.currentNode, start);
                    range.setEnd(walker.currentNode, start + word.length);
                    const box = range.getBoundingClientRect();
                    return [box.x + box.width / 2, box.y + box.height / 2];
                }
            }""",
            word,
        )
        self.page.mouse.click(*place)

    def use(self, tool: str) -> None:
        """Press one of the buttons beside the line: Retry, Edit, Undo, New conversation."""
        self.page.get_by_role("button", name=tool, exact=True).click()

    def look(self, control: str) -> None:
        """Press a control of the attention panel, for example `kind:self`."""
        self.attention.locator(f'[data-look="{control}"]').click()
        chosen = self.attention.locator(f'[data-look="{control}"][aria-pressed="true"]')
        expect(chosen).to_have_count(1)

    def click_cell(self, row: int, share: float) -> None:
        """Click the grid in a row, at a share of the video's time."""
        plot, cells = self.plot.bounding_box(), self.rows.nth(row).bounding_box()
        middle = cells["y"] + cells["height"] / 2 - plot["y"]
        self.plot.click(position={"x": plot["width"] * share, "y": middle})

    def at_stage(self, stage: str) -> None:
        expect(self.page.locator(f'.line-working[data-stage="{stage}"]')).to_be_visible()

    def player_time(self) -> float:
        return self.player.evaluate("video => video.currentTime")

    def wait_for_player_time(self, seconds: float) -> None:
        self.page.wait_for_function(
            "at => Math.abs(document.querySelector('.player video').currentTime - at) < 0.2",
            arg=seconds,
        )

    def has_sideways_scroll(self) -> bool:
        return self.page.evaluate(
            "document.documentElement.scrollWidth > document.documentElement.clientWidth"
        )
