"""The page: layout and wiring, no logic."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from app import fragments
from app.api import Endpoints, add_endpoints
from app.chat import Line
from app.fetch import MAX_URL_CHARS
from app.gate import Gate
from app.handlers import Components, Handlers
from app.panels.attention import attention_panel
from app.panels.savings import savings_panel
from app.routes import media_url, routes
from app.sessions import Sessions
from app.settings import Settings
from app.sources import Sample
from app.upload import only_uploads
from app.worker import Worker

STATIC = Path(__file__).parent / "static"
STYLES = ("page", "timeline", "attention", "saved")
LOOK_SCRIPTS = ("attention", "what_if")

_CACHE_LOOK_SECONDS, _CACHE_AGE_SECONDS = 600, 3600

# Clicks inside our HTML, handed to Python with what the button stands for.
_SEND = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-%(name)s]");
  if (button) trigger("click", { %(name)s: button.dataset.%(name)s });
});
"""

# A word of an answer that was clicked: page.js counts it.
_WORD = """
document.addEventListener("crosslmm-word", (event) => trigger("click", { word: event.detail }));
"""


def build(
    settings: Settings, worker: Worker, sessions: Sessions, samples: Sequence[Sample]
) -> gr.Blocks:
    """Put the page together."""
    with gr.Blocks(
        title=fragments.NAME,
        fill_width=True,
        analytics_enabled=False,
        delete_cache=(_CACHE_LOOK_SECONDS, _CACHE_AGE_SECONDS),
    ) as demo:
        with gr.Row(elem_id="top"):
            _html(fragments.header(), elem_id="header")
            status = _html(
                fragments.STATUS,
                elem_id="status",
                js_on_load=(STATIC / "status.js").read_text(encoding="utf-8"),
            )
        with gr.Row(elem_id="columns"):
            with gr.Column(elem_id="talk", min_width=300):
                visit = _html("", elem_id="visit", js_on_load=_SEND % {"name": "visit"})
                with gr.Row(elem_id="sources"):
                    cards = _sample_cards(sessions, samples)
                    upload = only_uploads(
                        gr.File(label="Upload a video", elem_id="upload", height=96)
                    )
                url, fetch, cancel = _web_address()
                notice = _html("", elem_id="notice")
                player = _html(fragments.player(None, ""), elem_id="player")
                plan = _html(
                    "",
                    elem_id="plan",
                    js_on_load=(STATIC / "preflight.js").read_text(encoding="utf-8"),
                )
                timeline = _html("", elem_id="timeline")
                chat = _chatbot()
                with gr.Row(elem_id="turn"):
                    line = _html(
                        fragments.status_line(Line("idle")), elem_id="line", js_on_load=_WORD
                    )
                    tools = _html(
                        fragments.tools(()), elem_id="tools", js_on_load=_SEND % {"name": "tool"}
                    )
                chips = _html(
                    fragments.chips(()), elem_id="chips", js_on_load=_SEND % {"name": "question"}
                )
                question, ask, stop = _composer(settings)
                note = _html("", elem_id="note")
            with gr.Column(elem_id="panels", min_width=300):
                attention, what_if, what_if_result = _attention()
                savings = _html(savings_panel(()), elem_id="savings")
        page = Components(
            upload, url, fetch, cancel, notice, player, visit, plan, timeline, chat, line, tools,
            chips, question, ask, stop, note, attention, what_if, what_if_result, savings,
        )  # fmt: skip
        handlers = Handlers(settings, worker, sessions, samples, page)
        _wire(demo, handlers, page, cards, status)
        add_endpoints(Endpoints(handlers, sessions, worker, settings, samples))
    return demo.queue(default_concurrency_limit=None)


def _html(value: str, **options: Any) -> gr.HTML:
    return gr.HTML(value, apply_default_css=False, **options)


def _attention() -> tuple[gr.HTML, gr.HTML, gr.HTML]:
    """The panel "Where it looked", its form for what-ifs, and their result."""
    scripts = [(STATIC / f"{name}.js").read_text(encoding="utf-8") for name in LOOK_SCRIPTS]
    return (
        _html(attention_panel(None, None), elem_id="attention", js_on_load=scripts[0]),
        _html("", elem_id="what-if", js_on_load=scripts[1]),
        _html("", elem_id="what-if-result", js_on_load=_SEND % {"name": "halt"}),
    )


def _sample_cards(sessions: Sessions, samples: Sequence[Sample]) -> gr.HTML:
    posters = [
        media_url(sessions.publish(one.poster)) if one.poster is not None else "" for one in samples
    ]
    return _html(
        fragments.sample_cards(samples, posters),
        elem_id="samples",
        visible=bool(samples),
        js_on_load=_SEND % {"name": "sample"},
    )


def _web_address() -> tuple[gr.Textbox, gr.Button, gr.Button]:
    with gr.Row(elem_id="web"):
        url = gr.Textbox(
            label="Web address of a video",
            show_label=False,
            container=False,
            placeholder="or paste a web address",
            lines=1,
            max_lines=1,
            max_length=MAX_URL_CHARS,
            elem_id="url",
            scale=1,
            html_attributes=gr.InputHTMLAttributes(
                enterkeyhint="go", autocomplete="off", autocapitalize="off", spellcheck=False
            ),
        )
        fetch = gr.Button("Fetch", elem_id="fetch", scale=0, min_width=88)
        cancel = gr.Button("Cancel", variant="stop", elem_id="cancel", scale=0, min_width=88)
        cancel.visible = False
    return url, fetch, cancel


def _chatbot() -> gr.Chatbot:
    return gr.Chatbot(
        label="Conversation",
        show_label=False,
        elem_id="chat",
        height=300,
        buttons=[],
        layout="bubble",
        feedback_options=None,
        latex_delimiters=[],
        allow_tags=False,
        placeholder="Your questions and the answers appear here.",
    )


def _composer(settings: Settings) -> tuple[gr.Textbox, gr.Button, gr.Button]:
    with gr.Row(elem_id="composer"):
        question = gr.Textbox(
            label="Question",
            show_label=False,
            container=False,
            placeholder="Ask about the video",
            lines=1,
            max_lines=5,
            max_length=settings.max_question_chars,
            elem_id="question",
            scale=1,
            html_attributes=gr.InputHTMLAttributes(enterkeyhint="send", autocomplete="off"),
        )
        ask = gr.Button("Ask", variant="primary", elem_id="ask", scale=0, min_width=88)
        stop = gr.Button("Stop", variant="stop", elem_id="stop", scale=0, min_width=88)
        stop.visible = False
    return question, ask, stop


def _wire(
    demo: gr.Blocks, handlers: Handlers, page: Components, cards: gr.HTML, status: gr.HTML
) -> None:
    def on(trigger: Any, fn: Any, inputs: Any, outputs: list[Any], **more: Any) -> None:
        # Named apart from the endpoints for programs, which are in api.py.
        trigger(
            fn,
            inputs,
            outputs,
            show_progress="hidden",
            api_name=f"page_{fn.__name__}",
            api_visibility="private",
            concurrency_limit=None,
            **more,
        )

    turn = [
        page.question, page.plan, page.timeline, page.chat, page.line, page.tools, page.ask,
        page.stop, page.attention, page.what_if, page.what_if_result, page.savings,
    ]  # fmt: skip
    video = [page.upload, page.notice, page.player, page.visit, page.chips, *turn]
    web = [page.url, page.fetch, page.cancel]
    on(page.upload.upload, handlers.upload, page.upload, video)
    on(
        partial(gr.on, [page.url.submit, page.fetch.click]),
        handlers.fetch, page.url, [*video, *web],
    )  # fmt: skip
    on(page.cancel.click, handlers.cancel_fetch, None, web[1:], queue=False)
    on(cards.click, handlers.pick_sample, None, video)
    # "multiple": Gradio would drop a question silently while one runs; the turn itself says why.
    send = partial(gr.on, [page.question.submit, page.ask.click], trigger_mode="multiple")
    on(send, handlers.ask, page.question, turn)
    on(page.chips.click, handlers.ask_chip, None, turn, trigger_mode="multiple")
    on(page.stop.click, handlers.stop, None, [page.ask, page.stop], queue=False)
    on(page.tools.click, handlers.use_tool, None, turn, trigger_mode="multiple")
    on(page.attention.look, handlers.look.choose, None, [page.attention], queue=False)
    on(page.what_if.again, handlers.look.try_what_if, None, [page.what_if_result])
    on(page.what_if_result.click, handlers.look.stop_what_if, None, None, queue=False)
    on(status.ready, handlers.model_ready, None, [page.note, page.chips, page.plan])
    looked = [page.line, page.attention, page.what_if, page.what_if_result]
    on(page.line.click, handlers.show_word, None, looked)
    on(page.visit.click, handlers.go_back, None, video)
    on(page.plan.click, handlers.adjust, None, [page.plan], trigger_mode="multiple")
    on(demo.load, handlers.restore, None, video)
    demo.unload(handlers.leave)


def theme() -> gr.themes.Base:
    """Calm greys and one colour; fonts that Gradio serves itself or the system has."""
    # 400 and 700: Gradio's file for 600 lacks most letters.
    text = (gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)), "system-ui", "sans-serif")
    base = gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        secondary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.zinc,
        radius_size=gr.themes.sizes.radius_lg,
        font=text,
        font_mono=("ui-monospace", "monospace"),
    )
    # The page's own colours are in page.css; Gradio's parts take theirs from there.
    return base.set(
        body_background_fill="var(--ground)",
        body_background_fill_dark="var(--ground)",
        body_text_color="var(--ink)",
        body_text_color_dark="var(--ink)",
        block_background_fill="var(--card)",
        block_background_fill_dark="var(--card)",
        block_border_color="var(--edge)",
        block_border_color_dark="var(--edge)",
        block_border_width="1px",
        block_shadow="none",
        input_background_fill="var(--card)",
        input_background_fill_dark="var(--card)",
        input_border_color="var(--edge)",
        input_border_color_dark="var(--edge)",
        input_border_width="1px",
        button_primary_background_fill="var(--brand-strong)",
        button_primary_background_fill_dark="var(--brand-strong)",
        button_primary_background_fill_hover="var(--brand-hover)",
        button_primary_background_fill_hover_dark="var(--brand-hover)",
        button_primary_text_color="var(--on-brand)",
        button_primary_text_color_dark="var(--on-brand)",
        button_cancel_background_fill="var(--card)",
        button_cancel_background_fill_dark="var(--card)",
        button_cancel_text_color="var(--alert)",
        button_cancel_text_color_dark="var(--alert)",
        layout_gap="14px",
    )


def launch_options(settings: Settings, worker: Worker, sessions: Sessions) -> dict[str, Any]:
    """Arguments for `Blocks.launch`."""
    script = "\n".join(
        (STATIC / name).read_text(encoding="utf-8") for name in ("page.js", "saved.js")
    )
    return {
        "server_name": settings.host,
        "server_port": settings.port,
        "share": settings.share,
        "auth": list(settings.auth) or None,
        "mcp_server": settings.mcp,
        "max_file_size": settings.max_upload_bytes,
        "state_session_capacity": settings.max_visitors,
        "theme": theme(),
        "css_paths": [STATIC / f"{name}.css" for name in STYLES],
        "head": f"<script>{script}</script>",
        "favicon_path": STATIC / "favicon.png",
        "footer_links": ["api"],
        "run_history": False,
        "enable_monitoring": False,
        "app_kwargs": {
            "routes": routes(worker, sessions),
            "middleware": [Middleware(Gate, settings=settings, disk=sessions.disk)],
        },
        "prevent_thread_lock": True,
        "quiet": True,
    }
