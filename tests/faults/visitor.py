"""A visitor's program over plain HTTP, so that it can also say what no client would."""

from __future__ import annotations

import functools
import http.client
import json
import secrets
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PATIENCE = 120.0  # seconds; only a broken app needs them
META = {"_type": "gradio.FileData"}


class Refused(Exception):
    """The app said no; the message is what it said."""


class Visitor:
    """One browser tab's worth of calls."""

    def __init__(self, url: str, patience: float = PATIENCE) -> None:
        self.address = urllib.parse.urlsplit(url).netloc
        self.key = secrets.token_hex(6)
        self.patience = patience

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        link = http.client.HTTPConnection(self.address, timeout=self.patience)
        try:
            link.request(method, urllib.parse.quote(path, "/=?&%"), body, headers or {})
            reply = link.getresponse()
            return reply.status, dict(reply.getheaders()), reply.read()
        finally:
            link.close()

    def post(self, path: str, data: Any) -> tuple[int, bytes]:
        sent = data if isinstance(data, bytes) else json.dumps(data).encode()
        headers = {"Content-Type": "application/json"}
        status, _, body = self.request("POST", path, sent, headers)
        return status, body

    def send_file(self, content: bytes | Iterator[bytes], name: str) -> tuple[int, bytes]:
        """Upload; an iterator is sent without saying how long it is."""
        head, tail = form(name)
        headers = {"Content-Type": "multipart/form-data; boundary=limit"}
        if isinstance(content, bytes):
            status, _, body = self.request(
                "POST", "/gradio_api/upload", head + content + tail, headers
            )
            return status, body
        whole = (part for parts in ([head], content, [tail]) for part in parts)
        try:
            status, _, body = self.request("POST", "/gradio_api/upload", whole, headers)
        except (BrokenPipeError, ConnectionResetError):  # it did not want to hear the rest
            return 0, b""
        return status, body

    def upload(self, path: Path, name: str | None = None) -> str:
        """Upload a file; returns where the server says it lies."""
        status, body = self.send_file(path.read_bytes(), name or path.name)
        if status != 200:
            raise Refused(f"{status} {body.decode()}")
        return json.loads(body)[0]

    def begin(self, name: str, *data: Any) -> str:
        values = [*data, *defaults(self.address).get(name, ())[len(data) - 1 :]]
        status, body = self.post(
            f"/gradio_api/call/{name}", {"data": values, "session_hash": self.key}
        )
        if status != 200:
            raise Refused(f"{status} {body.decode()}")
        return json.loads(body)["event_id"]

    def listen(self, name: str, event: str) -> Iterator[tuple[str, Any]]:
        """What a call tells: pairs of kind and data. Closing the iterator hangs up."""
        link = http.client.HTTPConnection(self.address, timeout=self.patience)
        try:
            link.request("GET", f"/gradio_api/call/{name}/{event}")
            reply, kind = link.getresponse(), ""
            while line := reply.readline():
                field, _, text = line.decode().strip().partition(": ")
                if field == "event":
                    kind = text
                elif field == "data":
                    yield kind, json.loads(text)
                    if kind in ("complete", "error"):
                        return
        finally:
            link.close()

    def call(self, name: str, *data: Any) -> Any:
        """The last thing that a queued call tells. One at a time: they share a stream."""
        last = None
        for kind, told in self.listen(name, self.begin(name, *data)):
            if kind == "error":
                raise Refused(str((told or {}).get("error")))
            if kind in ("generating", "complete") and told:
                last = told[0]
        return last

    def add(self, path: Path, name: str | None = None) -> dict[str, Any]:
        return self.call("add_video", {"path": self.upload(path, name), "meta": META})

    def stop(self) -> bool:
        """Not queued: its answer comes at once, beside the stream of another call."""
        status, body = self.post("/gradio_api/run/stop", {"data": [""], "session_hash": self.key})
        if status != 200:
            raise Refused(f"{status} {body.decode()}")
        return json.loads(body)["data"][0]

    def ask(self, question: str) -> dict[str, Any]:
        return self.call("ask", question)


@functools.cache
def defaults(address: str) -> dict[str, tuple[Any, ...]]:
    """What follows the first value of each endpoint, as the app itself tells."""
    with urllib.request.urlopen(f"http://{address}/gradio_api/info", timeout=PATIENCE) as reply:
        endpoints = json.load(reply)["named_endpoints"]
    return {
        name.strip("/"): tuple(one["parameter_default"] for one in told["parameters"][1:])
        for name, told in endpoints.items()
    }


def form(name: str) -> tuple[bytes, bytes]:
    """What stands before and after a file in an upload whose boundary is `limit`."""
    quoted = name.replace("\\", "\\\\").replace('"', '\\"')
    head = f'--limit\r\nContent-Disposition: form-data; name="files"; filename="{quoted}"\r\n\r\n'
    return head.encode(), b"\r\n--limit--\r\n"
