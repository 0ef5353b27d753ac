"""Every setting of the app, from the command line and the environment.

One frozen dataclass. Each field is an option (`max_frames` is `--max-frames`) and an environment
variable (`CROSSLMM_MAX_FRAMES`); the command line wins.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from model.types import ReadBounds

PREFIX = "CROSSLMM_"

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_bytes(text: str) -> int:
    """Read a size such as `500MB`, `2 GB` or a plain number of bytes."""
    compact = text.replace(" ", "").upper()
    digits = compact.rstrip("KMGTB")
    unit = compact[len(digits) :]
    try:
        return int(float(digits) * _UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        raise ValueError(f"a size such as 500MB or 2GB is expected, not {text!r}") from None


def show_bytes(count: int) -> str:
    """Write a size the way `parse_bytes` reads it."""
    for unit in ("TB", "GB", "MB", "KB"):
        if count >= _UNITS[unit]:
            return f"{count / _UNITS[unit]:.3g} {unit}"
    return f"{count} B"


def parse_flag(text: str) -> bool:
    """Read an environment variable that says yes or no."""
    if text.lower() in {"1", "true", "yes", "on"}:
        return True
    if text.lower() in {"0", "false", "no", "off", ""}:
        return False
    raise ValueError(f"yes or no is expected, not {text!r}")


def parse_auth(text: str) -> tuple[tuple[str, str], ...]:
    """Read `user:password`, or several of them separated by commas."""
    pairs = tuple(tuple(part.split(":", 1)) for part in text.split(",") if part)
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise ValueError("user:password is expected (several separated by commas)")
    return pairs


def option(
    default: Any,
    group: str,
    read: Any,
    text: str,
    metavar: str | None = None,
    *,
    choices: tuple[str, ...] = (),
    shared: Any = None,
) -> Any:
    """Declare a field that is also an option: how to read it, and its line of help.

    `choices` are all that may be given; `shared` is the default where the page is public.
    """
    metadata = {
        "group": group,
        "read": read,
        "help": text,
        "metavar": "|".join(choices) or metavar,
        "choices": choices,
        "shared": shared,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """What the page and its worker are told at the start. Times in seconds, sizes in bytes."""

    model: str | None = option(
        None,
        "model",
        str,
        "folder, hub id or ENCODER+LLM; the bundled model when not given",
        "SOURCE",
    )
    quantization: str = option(
        "auto",
        "model",
        str.lower,
        "how to hold the weights; auto is 4bit on a GPU and none on a CPU",
        choices=("auto", "none", "8bit", "4bit"),
    )
    pooled_grid: int | None = option(
        None,
        "model",
        int,
        "side of the grid that each frame is pooled to: 3 is 9 tokens per frame in the language "
        "model; the checkpoint's own when not given",
        "N",
    )
    kv_precision: str = option(
        "native",
        "model",
        str.lower,
        "how to hold a video's keys and values: int8 takes half the memory, int4 a quarter",
        choices=("native", "int8", "int4"),
    )
    repeat_threshold: float = option(
        0.0,
        "model",
        float,
        "mean difference of pixels, on a scale of -1 to 1, up to which a frame counts as a repeat "
        "of the one before and is not encoded again",
        "X",
    )
    compile_encoder: bool = option(
        False,
        "model",
        parse_flag,
        "compile the image encoder while loading; on a CPU it never pays",
    )
    device: str = option("auto", "model", str, "device that runs the model", "NAME")
    memory_budget: int = option(
        2 * 10**9, "model", parse_bytes, "memory for videos kept for more questions", "SIZE"
    )
    max_frames: int | None = option(
        None, "model", int, "most frames of a video; the model's own limit when not given", "N"
    )
    max_new_tokens: int | None = option(
        None, "model", int, "longest answer, in tokens; the model's own limit when not given", "N"
    )
    strongest_frames: int = option(
        6, "model", int, "pictures in the panel of strongest frames", "N"
    )
    map_bytes: int = option(
        16 * 2**20, "model", parse_bytes, "most that the attention maps of an answer take", "SIZE"
    )
    kept_maps: int = option(
        4, "model", int, "a visitor's last answers whose attention maps are kept", "N"
    )
    all_map_bytes: int = option(
        2**30,
        "model",
        parse_bytes,
        "most that the kept maps of all visitors take; those of silent ones go first",
        "SIZE",
    )

    host: str | None = option(
        None, "server", str, "address to listen on; only this machine when not given", "ADDRESS"
    )
    port: int | None = option(
        None, "server", int, "port to listen on; the first free one from 7860 when not given", "N"
    )
    share: bool = option(
        False,
        "server",
        parse_flag,
        "make a public link through a tunnel; limits are tighter then, unless given",
    )
    auth: tuple[tuple[str, str], ...] = option(
        (),
        "server",
        parse_auth,
        "ask visitors to log in; several users separated by commas",
        "USER:PASSWORD",
    )
    mcp: bool = option(
        False,
        "server",
        parse_flag,
        "serve the endpoints as MCP tools too; needs: pip install 'gradio[mcp]'",
    )
    data_dir: str | None = option(
        None, "server", str, "folder for visitors' videos; a temporary one when not given", "FOLDER"
    )
    log_level: str = option("info", "server", str.lower, "debug, info, warning or error", "LEVEL")

    max_upload_bytes: int = option(
        2 * 10**9, "limits", parse_bytes, "largest video that is taken", "SIZE", shared=500 * 10**6
    )
    max_video_seconds: float = option(
        4 * 3600.0, "limits", float, "longest video that is taken", "S", shared=3600.0
    )
    max_request_bytes: int = option(
        10**6, "limits", parse_bytes, "largest request that is no upload", "SIZE"
    )
    max_disk_bytes: int = option(
        20 * 10**9, "limits", parse_bytes, "most that all visitors' videos may take", "SIZE"
    )
    upload_age_seconds: float = option(
        3600.0, "limits", float, "uploads that nobody uses are deleted after this time", "S"
    )
    max_video_pixels: int = option(
        8192 * 4320, "limits", int, "largest frame of a video, in pixels", "N"
    )
    max_video_frames: int = option(2_000_000, "limits", int, "most frames in a video file", "N")
    check_seconds: float = option(
        30.0, "limits", float, "longest that checking a video may take", "S"
    )
    frame_seconds: float = option(
        60.0, "limits", float, "longest that decoding may take until the next frame", "S"
    )
    read_seconds: float = option(
        900.0, "limits", float, "longest that decoding and encoding a video may take", "S"
    )
    answer_seconds: float = option(
        300.0, "limits", float, "longest that an answer may take once the video is read", "S"
    )
    decoder_memory: int = option(
        3 * 10**9, "limits", parse_bytes, "memory of the process that decodes a video", "SIZE"
    )
    max_fetch_bytes: int = option(
        500 * 10**6,
        "limits",
        parse_bytes,
        "most that is downloaded from a pasted address",
        "SIZE",
        shared=200 * 10**6,
    )
    max_fetch_seconds: float = option(
        600.0, "limits", float, "longest time that such a download may take", "S"
    )
    max_fetches: int = option(4, "limits", int, "such downloads at the same time", "N", shared=2)
    max_question_chars: int = option(2000, "limits", int, "longest question", "N")
    max_history_turns: int = option(
        8, "limits", int, "earlier questions that the model is told of", "N"
    )
    max_turns: int = option(
        100, "limits", int, "questions of a conversation that are kept; the oldest go first", "N"
    )
    max_visit_videos: int = option(
        4, "limits", int, "videos of one visit that can be gone back to", "N", shared=2
    )
    queue_size: int = option(
        20, "limits", int, "questions that may wait before 'busy'", "N", shared=8
    )
    max_visitors: int = option(
        1000, "limits", int, "visitors at a time; beyond, the most silent one is forgotten", "N"
    )
    session_idle_seconds: float = option(
        2 * 3600.0,
        "limits",
        float,
        "a visitor's videos are deleted after this much silence",
        "S",
        shared=1800.0,
    )
    session_grace_seconds: float = option(
        600.0, "limits", float, "... and this long after the page was closed", "S", shared=120.0
    )

    worker: str = option(
        "auto",
        "worker",
        str.lower,
        "where turns run: a process that keeps the model (resident), or calls of a GPU that is "
        "lent by the second (zerogpu); auto takes zerogpu in a ZeroGPU Space",
        choices=("auto", "resident", "zerogpu"),
    )
    gpu_operations_per_second: float = option(
        1e14, "worker", float, "speed that zerogpu turns are planned with", "N"
    )
    gpu_start_seconds: float = option(
        15.0, "worker", float, "planned for lending a GPU and moving the model to it", "S"
    )
    gpu_most_seconds: float = option(
        120.0, "worker", float, "longest time that a GPU is asked for", "S"
    )
    engine: str = option(
        "model.engine:Engine", "worker", str, "class that answers, as module:name", "NAME"
    )
    stop_grace_seconds: float = option(
        5.0, "worker", float, "after Stop, the worker is replaced when not idle by then", "S"
    )
    heartbeat_seconds: float = option(0.5, "worker", float, "time between two beats", "S")
    heartbeat_timeout_seconds: float = option(
        20.0, "worker", float, "the worker is replaced after this much silence", "S"
    )
    load_timeout_seconds: float = option(
        1800.0, "worker", float, "longest that loading the model may take", "S"
    )
    max_restarts: int = option(
        3, "worker", int, "times in a row that a dying load is tried again", "N"
    )

    def __post_init__(self) -> None:
        optional = {"max_frames", "max_new_tokens", "pooled_grid", "port"}
        not_counted = {
            "repeat_threshold",
            "compile_encoder",
            "share",
            "mcp",
            "max_restarts",
            "max_history_turns",
            "strongest_frames",
            "port",
        }
        for one in fields(self):
            value, choices = getattr(self, one.name), one.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(
                    f"{one.name} must be {', '.join(choices[:-1])} or {choices[-1]}, not {value!r}"
                )
            if value is None and one.name in optional:
                continue
            if isinstance(value, int | float) and one.name not in not_counted and not value > 0:
                raise ValueError(f"{one.name} must be above 0, not {value}")
        if self.port is not None and not 0 < self.port < 65536:
            raise ValueError(f"port must be between 1 and 65535, not {self.port}")
        for name in ("repeat_threshold", "max_restarts", "max_history_turns", "strongest_frames"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} cannot be below 0, not {getattr(self, name)}")
        if self.heartbeat_timeout_seconds < 2 * self.heartbeat_seconds:
            raise ValueError(
                f"heartbeat_timeout_seconds ({self.heartbeat_timeout_seconds}) must be at least "
                f"twice heartbeat_seconds ({self.heartbeat_seconds})"
            )
        if ":" not in self.engine:
            raise ValueError(f"engine must be written module:name, not {self.engine!r}")
        if self.log_level not in {"debug", "info", "warning", "error"}:
            raise ValueError(
                f"log_level must be debug, info, warning or error, not {self.log_level!r}"
            )

    @property
    def read_bounds(self) -> ReadBounds:
        """What the process that reads a video may take."""
        return ReadBounds(
            check_seconds=self.check_seconds,
            frame_seconds=self.frame_seconds,
            read_seconds=self.read_seconds,
            memory=self.decoder_memory,
        )

    @classmethod
    def parse(
        cls, argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None
    ) -> Settings:
        """Read the command line over the environment over the defaults; exits on a mistake."""
        parser = _parser(cls)
        given = vars(parser.parse_args(argv))
        environ = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        for one in fields(cls):
            variable = PREFIX + one.name.upper()
            try:
                if given[one.name] is not None:
                    values[one.name] = given[one.name]
                elif environ.get(variable):
                    values[one.name] = one.metadata["read"](environ[variable])
            except ValueError as error:
                parser.error(f"{variable}: {error}")
        if values.get("share"):
            tighter = {one.name: one.metadata["shared"] for one in fields(cls)}
            values = {name: value for name, value in tighter.items() if value is not None} | values
        try:
            return cls(**values)
        except ValueError as error:
            parser.error(str(error))


def _parser(cls: type[Settings]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python app.py",
        usage="python app.py [options]",
        description="CrossLMM Chat: ask a long video, and see where the model looked.",
        epilog=f"Every option can also be set by an environment variable, "
        f"for example {PREFIX}MAX_FRAMES=64 for --max-frames 64.",
    )
    groups = {
        "model": parser.add_argument_group("model"),
        "server": parser.add_argument_group("server"),
        "limits": parser.add_argument_group("limits"),
        "worker": parser.add_argument_group("background worker"),
    }
    for one in fields(cls):
        read, metavar = one.metadata["read"], one.metadata["metavar"]
        told, shared = one.metadata["help"], one.metadata["shared"]
        if one.default is not None and one.default != () and read is not parse_flag:
            tighter = f"; {_shown(shared, read)} with --share" if shared is not None else ""
            told += f" (default: {_shown(one.default, read)}{tighter})"
        name = "--" + one.name.replace("_", "-")
        if read is parse_flag:
            kind: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        else:
            kind = {"type": _named(read), "metavar": metavar}
        groups[one.metadata["group"]].add_argument(name, default=None, help=told, **kind)
    return parser


def _shown(value: Any, read: Any) -> str:
    return show_bytes(value) if read is parse_bytes else f"{value:g}" if read is float else value


def _named(read: Any) -> Any:
    """Let argparse show a ValueError's own words instead of the function's name."""

    def convert(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert
