"""What the page's events do: from a visitor's input to new values of the components."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app import fragments, links
from app.chat import Line, Update, run_turn
from app.choices import within
from app.disk import NO_ROOM
from app.downloads import Downloaded, Downloads
from app.look_handlers import LookHandlers, LookParts
from app.panels.run_card import run_card_section
from app.panels.savings import savings_panel
from app.panels.timeline import timeline
from app.preflight import WAITING, adjust, plan_card
from app.routes import export_url, media_url
from app.run_card import run_card
from app.sessions import Session, Sessions
from app.settings import Settings
from app.sources import Sample, Video, take_fetched, take_sample, take_upload
from app.upload import uploaded
from app.worker import Worker
from model.types import InputError, PlanRequest, Stopped


@dataclass(frozen=True)
class Components:
    """The parts of the page that events change."""

    upload: gr.File
    url: gr.Textbox
    fetch: gr.Button
    cancel: gr.Button
    notice: gr.HTML
    player: gr.HTML
    visit: gr.HTML
    plan: gr.HTML
    timeline: gr.HTML
    chat: gr.Chatbot
    line: gr.HTML
    tools: gr.HTML
    chips: gr.HTML
    question: gr.Textbox
    ask: gr.Button
    stop: gr.Button
    note: gr.HTML
    attention: gr.HTML
    what_if: gr.HTML
    what_if_result: gr.HTML
    savings: gr.HTML


Changes = dict[Any, Any]

NOT_KEPT = "Where its words looked is kept of the latest answers only. Ask again to see it."

_PLAN_SECONDS = 2.0  # a plan that takes longer waits for the model to load

EDITING = "Change your question and send it: it takes the place of the last one."


class Handlers:
    """The page's events, for all visitors; what belongs to one is in their session."""

    def __init__(
        self,
        settings: Settings,
        worker: Worker,
        sessions: Sessions,
        samples: Sequence[Sample],
        page: Components,
    ) -> None:
        self._settings = settings
        self._worker = worker
        self._sessions = sessions
        self._samples = samples
        self._page = page
        self.downloads = Downloads(settings)
        parts = LookParts(page.attention, page.what_if, page.what_if_result)
        self.look = LookHandlers(settings, worker, sessions, parts)

    def session(self, request: gr.Request) -> Session:
        """Return the session of whoever calls."""
        return self._sessions.get(request.session_hash)

    # A video comes in.

    async def upload(self, path: str | None, request: gr.Request) -> Changes:
        """Take an uploaded file, or say what is wrong with it."""
        page = self._page
        if path is None:
            return {page.upload: gr.skip()}
        try:
            await self.take(self.session(request), path)
        except InputError as error:
            return {page.notice: fragments.notice(str(error)), page.upload: None}
        return await self._new_video(self.session(request))

    async def go_back(self, event: gr.EventData, request: gr.Request) -> Changes:
        """Show an earlier video of this visit again, with its conversation."""
        session = self.session(request)
        if not self._sessions.go_back(session, clicked(event, "visit")):
            return {self._page.notice: fragments.notice("That video is no longer here.")}
        self.downloads.cancel(session.id)
        return await self._new_video(session)

    async def adjust(self, event: gr.EventData, request: gr.Request) -> Changes:
        """Change how many frames are read, or how many tokens each has."""
        session, notices = self.session(request), ()
        try:
            chosen = adjust(session.choices, clicked(event, "adjust"))
            session.choices, notices = within(chosen, self._settings)
        except InputError as error:
            notices = (str(error),)
        return await self._plan(session, notices)

    async def pick_sample(self, event: gr.EventData, request: gr.Request) -> Changes:
        """Take the sample whose card was clicked."""
        try:
            await self.take(self.session(request), self._sample(clicked(event, "sample")))
        except InputError as error:
            return {self._page.notice: fragments.notice(str(error))}
        return await self._new_video(self.session(request))

    async def fetch(self, url: str, request: gr.Request) -> AsyncIterator[Changes]:
        """Fetch the video at a web address, telling how far it has come."""
        page = self._page
        last = {page.notice: ""}
        try:
            async for got in self.take_url(self.session(request), url or ""):
                if isinstance(got, Video):
                    last = {page.url: "", **await self._new_video(self.session(request))}
                else:
                    yield {page.notice: fragments.fetching(got), **self._fetch_buttons(True)}
        except InputError as error:
            last = {page.notice: fragments.notice(str(error))}
        except Stopped:
            pass
        yield {**last, **self._fetch_buttons(False)}

    def cancel_fetch(self, request: gr.Request) -> Changes:
        """Cancel the visitor's download; its own stream shows how it ends."""
        running = self.downloads.cancel(self.session(request).id)
        return self._fetch_buttons(running)

    def _fetch_buttons(self, running: bool) -> Changes:
        return {
            self._page.fetch: gr.update(visible=not running),
            self._page.cancel: gr.update(visible=running),
        }

    async def take_url(self, session: Session, url: str) -> AsyncIterator[Downloaded | Video]:
        """Fetch a video, check it and make it the session's; raises `InputError`, `Stopped`."""
        if not self._sessions.disk.has_room(0):
            raise InputError(NO_ROOM)
        run = self.downloads.run(session.id, url, session.folder)
        async with contextlib.aclosing(run):
            async for got in run:
                if isinstance(got, Downloaded):
                    yield got
                    continue
                video = await asyncio.to_thread(take_fetched, got, session.folder, self._settings)
                self._sessions.set_video(session, video)
                yield video

    def _sample(self, number: str) -> Sample:
        if not number.isdecimal() or int(number) >= len(self._samples):
            raise InputError("There is no such sample.")
        return self._samples[int(number)]

    async def take(self, session: Session, source: str | Sample) -> Video:
        """Check a video and make it the session's; raises `InputError`."""
        if isinstance(source, Sample):
            video = await asyncio.to_thread(take_sample, source, self._settings)
        else:
            path = uploaded(source, self._sessions.disk)
            video = await asyncio.to_thread(take_upload, path, session.folder, self._settings)
        self.downloads.cancel(session.id)  # or it would take this one's place
        self._sessions.set_video(session, video)
        return video

    async def _new_video(self, session: Session) -> Changes:
        page = self._page
        return {
            page.upload: None,
            page.notice: fragments.notice(""),
            page.player: fragments.player(session.video, media_url(session.media)),
            page.visit: fragments.visit(
                session.video, [(one.media, one.video) for one in session.earlier]
            ),
            **await self._plan(session),
            page.chips: fragments.chips(self._questions(session)),
            **self._idle(session),
        }

    async def _plan(self, session: Session, notices: tuple[str, ...] = ()) -> Changes:
        """Tell what the current video will take, as soon as the model can say."""
        if session.video is None:
            return {self._page.plan: ""}
        frames = session.choices.max_frames or self._settings.max_frames
        request = PlanRequest(session.video.info, frames, session.choices.pooled_tokens)
        answer = asyncio.wrap_future(self._worker.plan(request))
        await asyncio.wait({answer}, timeout=_PLAN_SECONDS)
        if not answer.done():
            answer.cancel()
            return {self._page.plan: plan_card(None, (*notices, WAITING))}
        if answer.exception() is not None:
            return {self._page.plan: plan_card(None, (*notices, str(answer.exception())))}
        return {self._page.plan: plan_card(answer.result(), notices)}

    def _idle(self, session: Session) -> Changes:
        """Show the conversation as it stands, with nothing under way."""
        return {
            self._page.line: fragments.status_line(Line("idle")),
            **self._conversation(session),
            **self._buttons(running=False),
            **self._panels(session),
        }

    def _questions(self, session: Session) -> tuple[str, ...]:
        """What to suggest: the sample's own questions, or what the model is good at."""
        if session.video is None:
            return ()
        model = self._worker.status().model
        return session.video.questions or (model.examples if model is not None else ())

    # A question.

    async def ask(self, message: str, request: gr.Request) -> AsyncIterator[Changes]:
        """Answer the question in the box, streaming."""
        sent = {self._page.question: ""}
        async for changes in self._turn(self.session(request), message or "", sent):
            yield changes

    async def ask_chip(self, event: gr.EventData, request: gr.Request) -> AsyncIterator[Changes]:
        """Answer a suggested question, streaming."""
        async for changes in self._turn(self.session(request), clicked(event, "question"), {}):
            yield changes

    async def _turn(self, session: Session, message: str, sent: Changes) -> AsyncIterator[Changes]:
        """Stream a turn; `sent` changes the page once the question has been accepted."""
        page, first = self._page, True
        async for update in run_turn(session, message, self._worker, self._settings):
            changes = {page.line: fragments.status_line(update.line)}
            if update.accepted:
                changes |= self._conversation(session)
                changes |= sent if first else {}
                changes |= await self._progress(session, update, first)
            first = False
            yield changes

    async def _progress(self, session: Session, update: Update, first: bool) -> Changes:
        changes: Changes = {}
        if first or update.finished:
            changes |= self._buttons(running=not update.finished)
        if update.answer is not None:
            changes |= await asyncio.to_thread(self._panels, session)
            changes |= await self._plan(session)
        elif update.frames or first:
            changes |= self._timeline(session)
        return changes

    def _conversation(self, session: Session) -> Changes:
        duration = session.video.info.duration if session.video is not None else 0.0
        return {
            self._page.chat: fragments.messages(session.turns, duration),
            self._page.tools: fragments.tools(session.turns, session.replacing),
        }

    def _panels(self, session: Session) -> Changes:
        return {
            **self._timeline(session),
            **self.look.show(session, session.turns[-1] if session.turns else None),
            self._page.savings: savings_panel(session.answers(), self._run_card(session)),
        }

    def _run_card(self, session: Session) -> str:
        answers, model = session.answers(), self._worker.status().model
        if not answers:
            return ""
        card = run_card(answers[-1], model, session.video, session.choices)
        return run_card_section(card, export_url(session))

    def _timeline(self, session: Session) -> Changes:
        video, answer = session.video, session.last_answer()
        duration = video.info.duration if video is not None else 0.0
        attention = answer.attention if answer is not None else None
        return {self._page.timeline: timeline(duration, session.strip, attention)}

    def _buttons(self, running: bool) -> Changes:
        return {
            self._page.ask: gr.update(visible=not running),
            self._page.stop: gr.update(visible=running),
        }

    def stop(self, request: gr.Request) -> Changes:
        """Stop the visitor's running answer; the turn itself shows how it ends."""
        if self.session(request).stop():
            return {self._page.stop: gr.skip()}
        return self._buttons(running=False)

    def show_word(self, event: gr.EventData, request: gr.Request) -> Changes:
        """Show where a clicked word of an answer looked; told as `answer:word`, counted from 0."""
        session, told = self.session(request), clicked(event, "word")
        answer, _, word = told.partition(":")
        nothing = {self._page.line: gr.skip()}
        if not (answer.isdecimal() and word.isdecimal() and len(told) < 12):
            return nothing
        replied = fragments.replied(session.turns)
        turn = replied[int(answer)] if int(answer) < len(replied) else None
        if turn is None or turn.result is None:
            return nothing
        if turn.result.attention is None:
            return {self._page.line: fragments.status_line(Line("note", NOT_KEPT))}
        return self.look.show_word(session, turn, int(word))

    async def use_tool(self, event: gr.EventData, request: gr.Request) -> AsyncIterator[Changes]:
        """Retry, edit or undo the last question, or begin a new conversation."""
        session, tool = self.session(request), clicked(event, "tool")
        if not session.turns or (session.job is not None and not session.job.done):
            return
        last = session.turns[-1].question
        if tool == "retry":
            session.replacing = True
            async for changes in self._turn(session, last, {}):
                yield changes
        elif tool in ("edit", "keep"):
            session.replacing = tool == "edit"
            yield {self._page.question: last if session.replacing else ""}
            # Gradio sends the last changes twice; the box must not be among them, or what is
            # typed in between would be lost.
            note = Line("note", EDITING) if session.replacing else Line("idle")
            yield {
                self._page.line: fragments.status_line(note),
                **self._conversation(session),
            }
        elif tool == "undo":
            session.turns.pop()
            session.replacing = False
            yield self._idle(session)
        elif tool == "new":
            session.begin_anew()
            yield self._idle(session)

    # The page's life.

    async def restore(self, request: gr.Request) -> Changes:
        """Take the sample and the settings that a link of ours asks for."""
        status = self._worker.status()
        model = status.model.name if status.model is not None else ""
        wanted = links.restore(request.query_params, self._settings, self._samples, model)
        if wanted is None:
            return {self._page.notice: gr.skip()}
        session = self.session(request)
        session.choices = wanted.choices
        changes: Changes = {}
        if wanted.sample is not None:
            try:
                await self.take(session, wanted.sample)
            except InputError as error:
                return {self._page.notice: fragments.notice(str(error))}
            changes = await self._new_video(session)
        return {**changes, self._page.notice: fragments.remark(links.told(wanted))}

    async def model_ready(self, request: gr.Request) -> Changes:
        """Show what is known only of a loaded model."""
        model = self._worker.status().model
        return {
            self._page.note: fragments.model_note(model.note if model is not None else ""),
            self._page.chips: fragments.chips(self._questions(self.session(request))),
            **await self._plan(self.session(request)),
        }

    def leave(self, request: gr.Request) -> None:
        """Note that the page was closed."""
        self.downloads.cancel(self.session(request).id)
        self._sessions.leave(request.session_hash)


def clicked(event: gr.EventData, name: str) -> str:
    """What a button of ours stands for; a visitor's program may send anything instead."""
    data = event._data
    return str(data.get(name, "")) if isinstance(data, dict) else ""
