"""What may come in over HTTP before anything else looks at it: sizes, and room for uploads."""

from __future__ import annotations

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.disk import FULL, NO_ROOM, Disk
from app.logs import log
from app.settings import Settings, show_bytes

_FORM_BYTES = 10**6  # what a form may add around a file, which Gradio measures by itself
_HEARD_BYTES = 8 * 10**6
_UPLOAD = "/upload"


class TooLarge(Exception):
    """The request's body goes on beyond its limit."""


class Gate:
    """Refuses a body that says it is too large at once, and one that turns out so as it comes."""

    def __init__(self, app: ASGIApp, settings: Settings, disk: Disk) -> None:
        self._app, self._settings, self._disk = app, settings, disk

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it with a sentence."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        upload = scope["path"].endswith(_UPLOAD)
        most = self._settings.max_request_bytes
        if upload:
            most = self._settings.max_upload_bytes + _FORM_BYTES
        said = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        length = int(said) if said.isdigit() else 0
        if length > most:
            await _hear_out(receive)
            await _refuse(scope, receive, send, 413, self._too_large(upload))
            return
        if upload and not self._disk.has_room(length):
            log("upload_refused", why="no room")
            await _refuse(scope, receive, send, 507, NO_ROOM)
            return
        await self._pass(scope, receive, send, most, upload)

    async def _pass(
        self, scope: Scope, receive: Receive, send: Send, most: int, upload: bool
    ) -> None:
        arrived, complete, answered = 0, False, False

        async def counted() -> Message:
            nonlocal arrived, complete
            message = await receive()
            complete = not message.get("more_body", False)
            arrived += len(message.get("body", b""))
            if arrived > most:
                raise TooLarge
            return message

        async def noted(message: Message) -> None:
            nonlocal answered
            answered = True
            if message["type"] == "http.response.start" and not complete:
                # The rest of the body is not waited for.
                headers = [*message.get("headers", ()), (b"connection", b"close")]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self._app(scope, counted, noted)
        except TooLarge:
            if answered:
                raise
            await _refuse(scope, receive, send, 413, self._too_large(upload))
        except OSError as error:
            if answered or error.errno not in FULL:
                raise
            log("upload_refused", why="disk full")
            await _refuse(scope, receive, send, 507, NO_ROOM)

    def _too_large(self, upload: bool) -> str:
        if upload:
            most = show_bytes(self._settings.max_upload_bytes)
            return f"The file is too large; at most {most} are taken."
        most = show_bytes(self._settings.max_request_bytes)
        return f"The request is too large; at most {most} are taken."


async def _hear_out(receive: Receive) -> None:
    """Let go by what comes, up to a point: many clients read no reply before they have sent all."""
    left = _HEARD_BYTES
    while left > 0:
        message = await receive()
        left -= len(message.get("body", b"")) + 1
        if not message.get("more_body", False):
            return


async def _refuse(scope: Scope, receive: Receive, send: Send, status: int, text: str) -> None:
    # The rest of the body stays unread, so the connection cannot serve another request.
    reply = PlainTextResponse(text, status_code=status, headers={"Connection": "close"})
    await reply(scope, receive, send)
