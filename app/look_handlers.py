"""What the panel "Where it looked" does on a click: another map, a what-if, files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import gradio as gr
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app.panels.attention import attention_panel
from app.panels.attention_files import maps_npz, maps_png
from app.panels.what_if import what_if_form, what_if_result
from app.sessions import Session, Sessions, Turn
from app.settings import Settings
from app.what_if import Tried, read_form, try_what_if
from app.worker import Worker
from model.types import InputError, WhatIf

Changes = dict[Any, Any]


@dataclass(frozen=True)
class LookParts:
    """The components that belong to this panel."""

    attention: gr.HTML
    what_if: gr.HTML
    result: gr.HTML


class LookHandlers:
    """The panel's events, for all visitors; what belongs to one is in their session."""

    def __init__(
        self, settings: Settings, worker: Worker, sessions: Sessions, parts: LookParts
    ) -> None:
        self._settings = settings
        self._worker = worker
        self._sessions = sessions
        self._parts = parts

    def show(self, session: Session, turn: Turn | None) -> Changes:
        """Turn the panel to a turn's answer, or empty it."""
        answer = turn.result if turn is not None else None
        session.looking.show(answer, turn.request if turn is not None else None)
        model, asked = self._worker.status().model, session.looking.request
        tokens = asked.what_if.pooled_tokens if asked is not None else None
        return {
            self._parts.attention: self._panel(session),
            self._parts.what_if: what_if_form(session.looking.look, model, tokens),
            self._parts.result: "",
        }

    def show_word(self, session: Session, turn: Turn, word: int) -> Changes:
        """Show where a word of an answer looked; `word` counts what lies between spaces."""
        changes: Changes = {}
        shown = session.looking.look
        if shown is None or shown.answer is not turn.result:
            changes = self.show(session, turn)
        look = session.looking.look
        if look is not None and look.maps and word < len(look.words):
            kind = "t2v" if look.attention.main == "t2v" else "self"
            session.looking.apply(f"kind:{kind}")
            session.looking.apply(f"word:{word}")
        return {**changes, self._parts.attention: self._panel(session)}

    def _panel(self, session: Session) -> str:
        model = self._worker.status().model
        return attention_panel(session.looking.look, model, self._settings.strongest_frames)

    def choose(self, event: gr.EventData, request: gr.Request) -> Changes:
        """Draw what a control of the panel stands for."""
        session = self._sessions.get(request.session_hash)
        data = event._data
        try:
            session.looking.apply(str(data.get("look", "")) if isinstance(data, dict) else "")
        except InputError:  # a program's, or of a panel that was replaced meanwhile
            return {self._parts.attention: gr.skip()}
        return {self._parts.attention: self._panel(session)}

    async def try_what_if(self, event: gr.EventData, request: gr.Request) -> AsyncIterator[Changes]:
        """Ask the shown question again with the form's changes, streaming."""
        session = self._sessions.get(request.session_hash)
        data = event._data if isinstance(event._data, dict) else {}
        look, result = session.looking.look, self._parts.result
        try:
            what_if = read_form(data)
        except InputError as error:
            yield {result: what_if_result(look, Tried(WhatIf(), problem=str(error)))}
            return
        async for tried in try_what_if(session, self._worker, what_if):
            yield {result: await asyncio.to_thread(what_if_result, look, tried)}

    def stop_what_if(self, request: gr.Request) -> None:
        """Stop the running what-if."""
        self._sessions.get(request.session_hash).stop()


def look_route(worker: Worker, sessions: Sessions) -> Route:
    """Pictures of frames and files of maps, under a token that cannot be guessed."""

    async def looked(request: Request) -> Response:
        looking = sessions.looking(request.path_params["token"])
        look = looking.look if looking is not None else None
        if looking is None or look is None:
            return Response("This answer is no longer here.", status_code=404)
        name, model = request.path_params["name"], worker.status().model
        headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, max-age=3600"}
        if name in ("maps.png", "maps.npz"):
            write = maps_png if name == "maps.png" else maps_npz
            content = await asyncio.to_thread(write, look, looking.request, model)
            headers |= {
                "Content-Disposition": f'attachment; filename="{name}"',
                "Cache-Control": "no-store",
            }
            kind = "image/png" if name == "maps.png" else "application/octet-stream"
            return Response(content, media_type=kind, headers=headers)
        number = name.removesuffix(".jpg")
        jpeg = look.picture(int(number)) if number.isdecimal() and len(number) < 6 else None
        if jpeg is None:
            return Response("There is no such frame.", status_code=404)
        return Response(jpeg, media_type="image/jpeg", headers=headers)

    return Route("/looked/{token}/{name}", looked)
