"""The same endpoints as MCP tools, called by a real MCP client over HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.app_server import App, running_app

mcp = pytest.importorskip("mcp", reason="needs the extra gradio[mcp]")

from mcp.client.streamable_http import streamable_http_client  # noqa: E402 (may be absent)

TOOLS = {"add_video", "add_video_url", "add_sample", "ask", "maps", "savings", "stop"}


@pytest.fixture(scope="module")
def mcp_app(gate_folder: Path) -> Iterator[App]:
    with running_app("--mcp", FAKE_GATES=str(gate_folder)) as app:
        app.wait_for("ready")
        yield app


class Agent:
    """One MCP client; every call opens a connection of its own, as stateless clients do."""

    def __init__(self, app: App) -> None:
        self.url = app.url + "gradio_api/mcp/"

    def call(self, tool: str, **arguments: Any) -> Any:
        result = asyncio.run(self._run(lambda client: client.call_tool(tool, arguments)))
        text = "".join(part.text for part in result.content)
        if result.isError:
            raise RuntimeError(text)
        return json.loads(text) if text[:1] in "{[" else text

    def tools(self) -> dict[str, Any]:
        listed = asyncio.run(self._run(lambda client: client.list_tools()))
        return {tool.name: tool for tool in listed.tools}

    async def _run(self, use: Any) -> Any:
        async with (
            streamable_http_client(self.url) as (read, write, _),
            mcp.ClientSession(read, write) as client,
        ):
            await client.initialize()
            return await use(client)


def test_tools_are_named_typed_and_documented(mcp_app: App) -> None:
    tools = Agent(mcp_app).tools()
    assert set(tools) == TOOLS
    for name, tool in tools.items():
        assert len(tool.description) > 20, name
        for argument, schema in tool.inputSchema["properties"].items():
            assert schema.get("description"), (name, argument)
    ask = tools["ask"].inputSchema
    assert ask["required"] == ["question"]
    assert ask["properties"]["max_frames"]["type"] == "integer"


def test_a_whole_visit(mcp_app: App) -> None:
    agent = Agent(mcp_app)
    session = agent.call("add_sample", title="Forty seconds")["session"]
    told = agent.call("ask", question="What is it?", max_frames=7, session=session)
    assert told["answer"].startswith("You asked: What is it?")
    assert len(told["frame_times"]) == 7
    maps = agent.call("maps", session=session)
    assert len(maps["rows"]) == len(maps["layers"])
    assert all(len(row) == 7 for row in maps["rows"])
    saved = agent.call("savings", session=session)
    assert saved["turn"]["systems"]["crosslmm"]["measured"]["seconds"] > 0
    assert agent.call("stop", session=session) in (False, "False", "false")


def test_agents_share_nothing_but_what_they_are_given(mcp_app: App) -> None:
    one, other = Agent(mcp_app), Agent(mcp_app)
    first = one.call("add_sample", title="Forty seconds")["session"]
    second = other.call("add_sample", title="Two minutes")["session"]
    assert first != second
    one.call("ask", question="Mine?", session=first)
    with pytest.raises(RuntimeError, match="no answer yet"):
        other.call("savings", session=second)
    for tool, arguments in (("ask", {"question": "Whose?"}), ("maps", {}), ("stop", {})):
        with pytest.raises(RuntimeError, match="Give the session that adding the video returned"):
            other.call(tool, **arguments)
    with pytest.raises(RuntimeError, match="This session is over or was never there"):
        other.call("ask", question="Whose?", session="A" * 24)


def test_files_come_by_upload_and_addresses_through_the_guard(
    mcp_app: App, videos: dict[str, Path]
) -> None:
    agent = Agent(mcp_app)
    with videos["h264"].open("rb") as file:
        reply = httpx.post(
            mcp_app.url + "gradio_api/upload", files={"files": ("holiday.mp4", file)}, timeout=60
        )
    (path,) = reply.json()
    added = agent.call("add_video", video=f"{mcp_app.url}gradio_api/file={path}")
    assert added["codec"] == "h264"
    assert agent.call("ask", question="Seen?", session=added["session"])["answer"]
    for address in (mcp_app.url + "health", "http://169.254.169.254/", "file:///etc/passwd"):
        with pytest.raises(RuntimeError, match="upload|provide a url"):
            agent.call("add_video", video=address)
    outside = f"{mcp_app.url}gradio_api/file=/etc/passwd"
    with pytest.raises(RuntimeError, match="no file that was uploaded here|upload"):
        agent.call("add_video", video=outside)
    with pytest.raises(RuntimeError, match="please upload the file instead"):
        agent.call("add_video_url", url=mcp_app.url)
