"""Named endpoints for programs: `gradio_client.Client(url).predict(..., api_name="/ask")`.

A client's calls share one session, as a browser tab's do.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import gradio as gr

from app.chat import run_turn
from app.handlers import Handlers
from app.settings import Settings
from app.sources import Sample, Video
from app.upload import only_uploads
from app.worker import Worker
from model.ask import as_json
from model.types import Answer, InputError, Stopped


def add_endpoints(
    handlers: Handlers, worker: Worker, settings: Settings, samples: Sequence[Sample]
) -> None:
    """Register the endpoints with the page being built."""

    async def add_video(video: str | None, request: gr.Request) -> dict[str, Any]:
        """Add a video file to the session; later questions are about it."""
        if video is None:
            raise problem("Give a video file, for example gradio_client.handle_file(path).")
        return await _added(handlers, request, video)

    async def add_video_url(url: str, request: gr.Request) -> AsyncIterator[dict[str, Any]]:
        """Add the video at a web address; streams how much has arrived, then what it is."""
        try:
            async for got in handlers.take_url(handlers.session(request), url):
                if isinstance(got, Video):
                    yield video_data(got)
                else:
                    yield {"stage": "fetching", "bytes": got.done, "total_bytes": got.total}
        except InputError as error:
            raise problem(str(error)) from error
        except Stopped as stopped:
            raise problem("The download was cancelled.") from stopped

    async def add_sample(title: str, request: gr.Request) -> dict[str, Any]:
        """Use one of the samples that come with the app, by its title."""
        found = next((one for one in samples if one.title == title), None)
        if found is None:
            known = ", ".join(one.title for one in samples) or "none"
            raise problem(f"There is no sample {title!r}. The samples are: {known}.")
        return await _added(handlers, request, found)

    async def ask(question: str, request: gr.Request) -> AsyncIterator[dict[str, Any]]:
        """Ask about the session's video; streams the text so far, then the whole answer."""
        session = handlers.session(request)
        async for update in run_turn(session, question, worker, settings):
            if update.line.kind == "problem":
                raise problem(update.line.text)
            if update.answer is not None:
                yield answer_data(update.answer)
            elif not update.finished:
                yield {"stage": update.line.stage, "answer": session.turns[-1].answer}

    def stop(request: gr.Request) -> bool:
        """Stop the session's running answer and download; tells whether there was one."""
        session = handlers.session(request)
        fetching = handlers.downloads.cancel(session.id)
        return session.stop() or fetching

    # A File component, because only then does Gradio take a file and check where it lies.
    hidden = {"visible": False, "render": True}
    file, told = only_uploads(gr.File(label="video", **hidden)), gr.JSON(label="video", **hidden)
    gr.Button(visible=False).click(
        add_video, file, told, api_name="add_video", concurrency_limit=None
    )
    named: tuple[tuple[Callable[..., Any], bool], ...] = (
        (add_video_url, True),
        (add_sample, True),
        (ask, True),
        (stop, False),
    )
    for endpoint, queued in named:
        gr.api(endpoint, api_name=endpoint.__name__, queue=queued, concurrency_limit=None)


def problem(text: str) -> gr.Error:
    """An error for the caller alone: the log is not for what visitors write."""
    return gr.Error(text, print_exception=False)


async def _added(handlers: Handlers, request: gr.Request, source: str | Sample) -> dict[str, Any]:
    try:
        return video_data(await handlers.take(handlers.session(request), source))
    except InputError as error:
        raise problem(str(error)) from error


def video_data(video: Video) -> dict[str, Any]:
    """What a program is told of an added video."""
    info = video.info
    return {
        "title": video.title,
        "duration": info.duration,
        "width": info.width,
        "height": info.height,
        "codec": info.codec,
        "frame_rate": info.frame_rate,
    }


def answer_data(answer: Answer) -> dict[str, Any]:
    """What a program is told of an answer: as on the command line, and how the turn went."""
    return {
        **as_json(answer),
        "stopped": answer.stopped,
        "memory_reused": answer.memory_reused,
        "notices": list(answer.notices),
    }
