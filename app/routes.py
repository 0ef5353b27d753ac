"""Our own addresses beside Gradio's: the player's videos and the worker's state.

They ask for no login: a token cannot be guessed, and the state names nobody.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from app.sessions import Sessions
from app.sources import MEDIA_TYPES
from app.worker import Worker

MEDIA = "media"


def media_url(token: str) -> str:
    """Address of a published file, relative to the page."""
    return f"{MEDIA}/{token}"


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
        status = worker.status()
        model = status.model
        told = {
            "state": status.state,
            "waiting": status.waiting,
            "restarts": status.restarts,
            "error": status.error,
            "model": model and {"name": model.name, "device": model.device},
        }
        return JSONResponse(told, headers={"Cache-Control": "no-store"})

    return [Route(f"/{MEDIA}/{{token}}", media), Route("/health", health)]
