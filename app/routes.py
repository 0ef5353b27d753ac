"""Our own addresses beside Gradio's: the player's videos, exports and the worker's state.

They ask for no login: a token cannot be guessed, and the state names nobody.
"""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from app.conversation import EXPORTS
from app.health import report
from app.look_handlers import look_route
from app.sessions import Session, Sessions
from app.sources import MEDIA_TYPES
from app.worker import Worker

MEDIA, EXPORT = "media", "export"


def media_url(token: str) -> str:
    """Address of a published file, relative to the page."""
    return f"{MEDIA}/{token}"


def export_url(session: Session) -> str:
    """Address under which a visitor's exports lie, relative to the page."""
    return f"{EXPORT}/{session.export}"


def routes(worker: Worker, sessions: Sessions) -> list[Route]:
    """Routes for Gradio's server; they come before its own."""

    async def media(request: Request) -> Response:
        path = sessions.media(request.path_params["token"])
        if path is None or not path.is_file():
            return Response("This video is no longer here.", status_code=404)
        # Only ever a media type of ours, so that no upload is taken for a page.
        return FileResponse(
            path,
            media_type=MEDIA_TYPES.get(path.suffix, "application/octet-stream"),
            headers={"X-Content-Type-Options": "nosniff", "Cache-Control": "private, no-store"},
        )

    async def health(_: Request) -> JSONResponse:
        disk_bytes = await asyncio.to_thread(sessions.disk.used)
        told = report(worker, sessions.count(), disk_bytes)
        return JSONResponse(told, headers={"Cache-Control": "no-store"})

    async def export(request: Request) -> Response:
        session = sessions.by_export(request.path_params["token"])
        made = EXPORTS.get(request.path_params["name"])
        if session is None or made is None:
            return Response("This is no longer here.", status_code=404)
        media_type, write = made
        headers = {
            "Content-Disposition": f'attachment; filename="{request.path_params["name"]}"',
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-store",
        }
        text = write(session, worker.status().model)
        return Response(text, media_type=media_type, headers=headers)

    return [
        Route(f"/{MEDIA}/{{token}}", media),
        Route(f"/{EXPORT}/{{token}}/{{name}}", export),
        Route("/health", health),
        look_route(worker, sessions),
    ]
