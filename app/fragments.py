"""The small pieces of HTML on the page. All text that is not ours is escaped here."""

from __future__ import annotations

import re
from collections.abc import Sequence

from app.chat import Line
from app.downloads import Downloaded
from app.panels.draw import clock, esc, percent, seconds
from app.sessions import Turn
from app.settings import show_bytes
from app.sources import Sample, Video

NAME = "CrossLMM Chat"
CLAIM = "Ask a long video a question, and see which moments the answer comes from."

_STAGES = (("reading", "Reading"), ("encoding", "Encoding"), ("answering", "Answering"))
# What Markdown would give a meaning: anywhere, at the start of a line, and in addresses.
_ANYWHERE = re.compile(r"[\\`*_\[\]<>|~$&@]|:(?=//)|(?<=www)\.")
_AT_START = re.compile(r"^(\d*)([#+=.)-])")
_TIME = re.compile(r"(?<![\d:])(?:(\d{1,2}):)?(\d{1,2}):([0-5]\d)(?![\d:])")
_CODEC_NAMES = {"h264": "H.264", "hevc": "HEVC", "vp8": "VP8", "vp9": "VP9", "av1": "AV1"}

_TOOLS = (
    ("retry", "Retry", "Ask the last question again"),
    ("edit", "Edit", "Change the last question and ask it again"),
    ("undo", "Undo", "Take the last question and its answer away"),
    ("new", "New conversation", "Begin anew with the same video, which is not read again"),
)
_KEEP = (("keep", "Leave it as it was", "Ask something new instead of changing the question"),)

_SQUARES = "".join(
    f'<rect x="{1 + 10 * x}" y="{1 + 10 * y}" width="8" height="8" rx="2"/>'
    for y in range(3)
    for x in range(3)
)
_LOGO = f'<svg class="logo" viewBox="0 0 30 30" aria-hidden="true">{_SQUARES}</svg>'


def header() -> str:
    """Name and claim."""
    return f'<header class="top">{_LOGO}<div><h1>{NAME}</h1><p>{CLAIM}</p></div></header>'


# Filled in by status.js from /health.
STATUS = (
    '<div class="corner"><div class="model-status" role="status" data-state="loading">'
    '<span class="dot"></span><span class="state">Starting</span><span class="detail"></span>'
    '</div><button type="button" class="theme" data-theme-toggle '
    'aria-label="Switch between light and dark"></button></div>'
)


def sample_cards(samples: Sequence[Sample], posters: Sequence[str]) -> str:
    """The samples to choose from; a poster is the address of a picture, or empty."""
    cards = "".join(
        f'<button type="button" class="sample" data-sample="{number}">'
        f'<span class="still">{_picture(poster)}<time>{clock(sample.duration)}</time></span>'
        f'<span class="sample-name">{esc(sample.title)}</span></button>'
        for number, (sample, poster) in enumerate(zip(samples, posters, strict=True))
    )
    return f'<div class="samples" role="group" aria-label="Sample videos">{cards}</div>'


def _picture(poster: str) -> str:
    return f'<img src="{esc(poster)}" alt="">' if poster else ""


def player(video: Video | None, url: str) -> str:
    """The player with a line about the file, or an invitation."""
    if video is None:
        return (
            '<div class="player"><div class="screen screen-empty">'
            "<p><b>No video yet</b>Choose a sample above, upload your own (mp4, webm, mkv or mov) "
            "or paste a web address.</p></div></div>"
        )
    info = video.info
    codec = _CODEC_NAMES.get(info.codec, info.codec)
    facts = " · ".join(
        (
            clock(info.duration),
            f"{info.width}×{info.height}",
            codec,
            f"{info.frame_rate:.3g} fps",
            show_bytes(info.size_bytes),
        )
    )
    return (
        f'<div class="player"><div class="screen"><video src="{esc(url)}" controls playsinline '
        f'preload="metadata" aria-label="{esc(video.title)}"></video>'
        f'<p class="unplayable" hidden>This browser cannot play {esc(codec)} video. '
        "The model can read it all the same.</p></div>"
        f'<p class="about"><b>{esc(video.title)}</b><span>{esc(facts)}</span></p></div>'
    )


def visit(current: Video | None, earlier: Sequence[tuple[str, Video]]) -> str:
    """The videos of this visit to go back to, each with its token, and the way to a new one."""
    if current is None:
        return ""
    others = "".join(
        f'<button type="button" class="tool" data-visit="{esc(token)}" '
        f'title="Back to {esc(video.title)}">↩ {esc(video.title)}</button>'
        for token, video in earlier
    )
    return (
        '<div class="visit" role="group" aria-label="Videos of this visit">'
        '<button type="button" class="tool new-video" data-new-video>+ New video</button>'
        f"{others}</div>"
    )


def notice(text: str) -> str:
    """What is wrong with the video that was to be added."""
    return f'<p class="notice" role="alert">{esc(text)}</p>' if text else ""


def remark(text: str) -> str:
    """What was done without being asked on the page, in place of the notice."""
    return f'<p class="notice remark" role="status">{esc(text)}</p>' if text else ""


def fetching(download: Downloaded) -> str:
    """How far a download has come, in place of the notice."""
    arrived = show_bytes(download.done)
    if download.total:
        arrived += f" of {show_bytes(download.total)}"
    text = f"Fetching the video · {arrived}" if download.done else "Looking for the video"
    value = f' value="{download.done}" max="{download.total}"' if download.total else ""
    return (
        f'<div class="notice fetching" role="status"><span>{text}</span>'
        f'<progress aria-label="Fetched"{value}></progress></div>'
    )


def model_note(text: str) -> str:
    """What the loaded model can and cannot do."""
    return f'<p class="model-note">{esc(text)}</p>' if text else ""


def chips(questions: Sequence[str]) -> str:
    """Questions to ask with one click."""
    buttons = "".join(
        f'<button type="button" class="chip" data-question="{esc(one)}">{esc(one)}</button>'
        for one in questions
    )
    return f'<div class="chips" role="group" aria-label="Example questions">{buttons}</div>'


def status_line(line: Line) -> str:
    """How far the turn is: the stages as steps, and one sentence."""
    if line.kind == "idle":
        return '<div class="line line-idle"></div>'
    if line.kind != "working":
        role = ' role="alert"' if line.kind == "problem" else ' role="status"'
        return f'<div class="line line-{line.kind}"{role}>{esc(line.text)}</div>'
    names = [name for name, _ in _STAGES]
    now = names.index(line.stage) if line.stage in names else -1
    steps = "".join(
        f'<span class="step{_step_state(place, now, line.share)}"'
        f"{_fill(place, now, line.share)}>{label}</span>"
        for place, (_, label) in enumerate(_STAGES)
    )
    css = ' class="unseen"' if now >= 0 and line.text == _STAGES[now][1] else ""
    return (
        f'<div class="line line-working" role="status" data-stage="{esc(line.stage)}">'
        f'<span class="steps" aria-hidden="true">{steps}</span>'
        f"<span{css}>{esc(line.text)}</span></div>"
    )


def _step_state(place: int, now: int, share: float | None) -> str:
    if place < now:
        return " past"
    if place > now:
        return ""
    return " now" if share is not None else " now unknown"


def _fill(place: int, now: int, share: float | None) -> str:
    return f' style="--done:{100 * share:.0f}%"' if place == now and share is not None else ""


def plain(text: str) -> str:
    """Write text as Markdown that shows it as it is, whatever it holds."""
    lines = []
    for line in text.split("\n"):
        escaped = _ANYWHERE.sub(r"\\\g<0>", line.lstrip())  # an indent would make a code block
        lines.append(_AT_START.sub(r"\1\\\2", escaped))
    return "\n".join(lines)


def with_time_links(text: str, duration: float) -> str:
    """Like `plain`, and every time within the video becomes a link that page.js makes seek."""

    def link(found: re.Match[str]) -> str:
        hours, minutes, rest = (int(group or 0) for group in found.groups())
        at = 3600 * hours + 60 * minutes + rest
        return f"[{found[0]}](#t={at})" if at <= duration else found[0]

    return _TIME.sub(link, plain(text))


def messages(turns: Sequence[Turn], duration: float) -> list[dict[str, str]]:
    """The conversation as Gradio's Chatbot takes it."""
    shown = []
    for turn in turns:
        shown.append({"role": "user", "content": plain(turn.question)})
        answer = with_time_links(turn.answer, duration)
        if turn.outcome == "failed":
            answer += ("\n\n" if answer else "") + f"*{plain(turn.problem)}*"
        elif turn.outcome == "stopped":
            answer += " *(stopped)*" if answer else "*Stopped before the first word.*"
        facts = answer_facts(turn)
        if answer and facts:
            answer += f"\n\n*{facts}*"
        if answer:
            shown.append({"role": "assistant", "content": answer})
    return shown


def replied(turns: Sequence[Turn]) -> list[Turn]:
    """The turns that have an answer among `messages`, in order."""
    return [turn for turn in turns if turn.answer or turn.outcome in ("failed", "stopped")]


def answer_facts(turn: Turn) -> str:
    """The small print under an answer, as Markdown: where it was seen, and how fast it came."""
    facts = []
    if turn.seen is not None:
        at, share = turn.seen, percent(turn.seen.share)
        where = f"[{clock(at.time)}](#t={at.time:.2f})"
        if at.clear:
            facts.append(f"Seen at {where}, clearly: {share} of its attention is there")
        else:
            facts.append(f"Probably seen at {where}: {share} of its attention is there")
    if turn.result is not None:
        facts.append(f"first word after {seconds(turn.result.timings.first_token)}")
    text = " · ".join(facts)
    return text[:1].upper() + text[1:]


def tools(turns: Sequence[Turn], replacing: bool = False) -> str:
    """What can be done with the last question; nothing while it is being answered."""
    if not turns or turns[-1].outcome == "running":
        return '<div class="tools"></div>'
    buttons = "".join(
        f'<button type="button" class="tool" data-tool="{name}" title="{told}">{label}</button>'
        for name, label, told in (_KEEP if replacing else _TOOLS)
    )
    return f'<div class="tools" role="group" aria-label="Conversation">{buttons}</div>'
