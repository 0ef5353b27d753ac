"""Named endpoints for programs: `gradio_client.Client(url).predict(..., api_name="/ask")`.

A client's calls share one session, as a browser tab's do. With `--mcp` the same endpoints are MCP
tools; Gradio makes all MCP calls through one client of its own, so there a session is known only
by the name that adding a video returns, and results are JSON text.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Literal

import gradio as gr
from gradio.components.api_component import Api
from gradio.context import Context

from app.api_data import answer_data, maps_data, savings_data, video_data
from app.chat import run_turn
from app.choices import Choices, within
from app.handlers import Handlers
from app.sessions import Session, Sessions
from app.settings import Settings
from app.sources import Sample, Video
from app.upload import only_uploads
from app.worker import Worker
from model.types import InputError, Stopped

Told = dict[str, Any]


class Endpoints:
    """What programs can call; every argument but the first has a default."""

    def __init__(
        self,
        handlers: Handlers,
        sessions: Sessions,
        worker: Worker,
        settings: Settings,
        samples: Sequence[Sample],
    ) -> None:
        self._handlers, self._sessions, self._worker = handlers, sessions, worker
        self._settings, self._samples = settings, samples

    async def add_video(self, request: gr.Request, video: str | None, session: str = "") -> Told:
        """Add a video file; later questions are about it.

        Args:
            video: the file, for example gradio_client.handle_file("video.mp4")
            session: whose video it becomes, as an earlier call returned it; empty for this client

        Returns:
            session, title, duration in seconds, width, height, codec, frame_rate

        """
        if video is None:
            raise problem("Give a video file, for example gradio_client.handle_file(path).")
        return await self._add(video, session, request)

    async def add_video_url(
        self, request: gr.Request, url: str, session: str = ""
    ) -> AsyncIterator[Told]:
        """Add the video at a web address; later questions are about it.

        Args:
            url: address of a video or of a page with one, beginning with https:// or http://
            session: whose video it becomes, as an earlier call returned it; empty for this client

        Returns:
            while it arrives: stage, bytes, total_bytes; then as add_video

        """
        own = self._session(request, session, new=True)
        try:
            async for got in self._handlers.take_url(own, url):
                if isinstance(got, Video):
                    yield reply(request, video_data(got, own))
                else:
                    told = {"stage": "fetching", "bytes": got.done, "total_bytes": got.total}
                    yield reply(request, told)
        except InputError as error:
            raise problem(str(error)) from error
        except Stopped as stopped:
            raise problem("The download was cancelled.") from stopped

    async def add_sample(self, request: gr.Request, title: str, session: str = "") -> Told:
        """Use one of the sample videos that come with the app.

        Args:
            title: of the sample, for example "Forty seconds"
            session: whose video it becomes, as an earlier call returned it; empty for this client

        Returns:
            as add_video

        """
        found = next((one for one in self._samples if one.title == title), None)
        if found is None:
            known = ", ".join(one.title for one in self._samples) or "none"
            raise problem(f"There is no sample {title!r}. The samples are: {known}.")
        return await self._add(found, session, request)

    async def ask(
        self,
        request: gr.Request,
        question: str,
        max_frames: int = 0,
        max_new_tokens: int = 0,
        tokens_per_frame: int = 0,
        session: str = "",
    ) -> AsyncIterator[Told]:
        """Ask about the video that was added; earlier questions about it are remembered.

        Args:
            question: in plain words
            max_frames: most frames of the video to look at; 0 for the app's own setting
            max_new_tokens: longest answer in tokens; 0 for the app's own setting
            tokens_per_frame: a square number such as 1, 4 or 9; 0 for the model's own
            session: whose video, as adding it returned; empty for this client

        Returns:
            while it is made: stage and the answer so far; then answer, model, tokens,
            frame_times, timings in seconds, attention, stopped, memory_reused, notices

        """
        own = self._session(request, session)
        wanted = Choices(
            number(max_frames, "max_frames"),
            number(max_new_tokens, "max_new_tokens"),
            number(tokens_per_frame, "tokens_per_frame"),
        )
        choices, clamped = within(wanted, self._settings)
        turns = run_turn(own, question, self._worker, self._settings, choices.over(own.choices))
        async for update in turns:
            if update.line.kind == "problem":
                raise problem(update.line.text)
            if update.answer is not None:
                yield reply(request, answer_data(update.answer, clamped))
            elif not update.finished:
                told = {"stage": update.line.stage, "answer": own.turns[-1].answer}
                yield reply(request, told)

    def maps(
        self,
        request: gr.Request,
        kind: Literal["main", "t2v", "v2v", "self"] = "main",
        token: int = -1,
        head: int = -1,
        session: str = "",
    ) -> Told:
        """Where the last answer's tokens looked in the video, by layer and frame.

        Args:
            kind: t2v text to visual, v2v visual to visual, self the language model's own, or main
            token: number of the answer's token, from 0; -1 for all of them
            head: number of the attention head, from 0; -1 for the mean of all
            session: whose answer, as adding the video returned; empty for this client

        Returns:
            kind, measure, times in seconds, layers, tokens, rows (a list of shares for each
            layer), timeline, peak in seconds, strongest frames, gates, exact

        """
        answers = self._session(request, session).answers()
        if not answers or answers[-1].attention is None:
            raise problem("There is no answer yet; ask something first.")
        try:
            told = maps_data(answers[-1].attention, self._worker.status().model, kind, token, head)
        except InputError as error:
            raise problem(str(error)) from error
        return reply(request, told)

    def savings(self, request: gr.Request, session: str = "") -> Told:
        """What the last answer and the whole conversation cost, and would have without pooling.

        Args:
            session: whose conversation, as adding the video returned; empty for this client

        Returns:
            turn and conversation (tokens, operations, key/value bytes, seconds, each marked as
            computed or measured), curves over the number of frames, run_card

        """
        own = self._session(request, session)
        if not own.answers():
            raise problem("There is no answer yet; ask something first.")
        return reply(request, savings_data(own, self._worker.status().model))

    def stop(self, request: gr.Request, session: str = "") -> bool:
        """Stop the running answer and the running download.

        Args:
            session: whose, as adding the video returned; empty for this client

        Returns:
            whether there was one

        """
        own = self._session(request, session)
        fetching = self._handlers.downloads.cancel(own.id)
        return own.stop() or fetching

    async def _add(self, source: str | Sample, session: str, request: gr.Request) -> Told:
        own = self._session(request, session, new=True)
        try:
            return reply(request, video_data(await self._handlers.take(own, source), own))
        except InputError as error:
            raise problem(str(error)) from error

    def _session(self, request: gr.Request, name: str, new: bool = False) -> Session:
        if name:
            session = self._sessions.by_name(str(name))
            if session is None:
                raise problem("This session is over or was never there; add the video again.")
            return session
        if not from_mcp(request):
            return self._handlers.session(request)
        if new:
            return self._sessions.get(None)
        raise problem("Give the session that adding the video returned.")


def add_endpoints(endpoints: Endpoints) -> None:
    """Register the endpoints with the page being built."""
    # A File component, because only then does Gradio take a file and check where it lies.
    file = only_uploads(gr.File(label="video", visible=False, render=True))
    session, told = Api("", {"type": "string"}), Api(None, {})
    added = gr.Button(visible=False).click(
        endpoints.add_video, [file, session], told, api_name="add_video", concurrency_limit=None
    )
    _describe(added, endpoints.add_video)
    named: tuple[tuple[Callable[..., Any], bool], ...] = (
        (endpoints.add_video_url, True),
        (endpoints.add_sample, True),
        (endpoints.ask, True),
        (endpoints.maps, False),
        (endpoints.savings, False),
        (endpoints.stop, False),
    )
    for endpoint, queued in named:
        name = endpoint.__name__
        made = gr.api(endpoint, api_name=name, queue=queued, concurrency_limit=None)
        _describe(made, endpoint)


def _describe(made: Any, endpoint: Callable[..., Any]) -> None:
    """Give an endpoint's arguments and result the words of its docstring, for `/info`."""
    block = Context.root_block.fns[made["id"]]
    doc = inspect.getdoc(endpoint) or ""
    arguments, _, returns = doc.partition("Args:")[2].partition("Returns:")
    told = dict(re.findall(r"^\s*(\w+): (.+)$", arguments, re.MULTILINE))
    names = [name for name in inspect.signature(endpoint).parameters if name != "request"]
    for component, name in zip(block.inputs, names, strict=True):
        component.label = name
        _words(component, "additional_description", told[name])
    for component in block.outputs:
        component.label = "result"
        _words(component, "description", " ".join(returns.split()))


def _words(component: Any, key: str, text: str) -> None:
    schema = {**component.api_info(), key: text}
    if isinstance(component, Api):
        component._api_info = schema
    else:  # a real component, which takes its schema from its class
        component.api_info = lambda: schema


def reply(request: gr.Request, told: Told) -> Any:
    """Plain data; for MCP, whose answers are texts, written as JSON and not as Python."""
    return json.dumps(told, ensure_ascii=False) if from_mcp(request) else told


def from_mcp(request: Any) -> bool:
    """Whether a call came in as an MCP tool: by Gradio's own client, or without a session."""
    if getattr(request, "session_hash", None) is None:
        return True
    return request.headers.get("x-gradio-user") == "mcp"


def number(value: int, name: str) -> int | None:
    """Read a number that a program gave: 0 is none of its own."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise problem(f"{name} must be a whole number from 0 on, not {value!r}.")
    return value or None


def problem(text: str) -> gr.Error:
    """An error for the caller alone: the log is not for what visitors write."""
    return gr.Error(text, print_exception=False)
