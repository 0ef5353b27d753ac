"""Stands in for the `spaces` package as it is on ZeroGPU, where it cannot be run elsewhere.

Like the real one: a call of a decorated generator function runs in a fork of this process, its
arguments and what it yields are pickled, an error arrives as `gr.Error` without its own words, a
fork that dies aborts the call, and `duration` is called with the same arguments. Each call's
duration is written to the file SPACES_LOG.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import gradio as gr

_FORK = multiprocessing.get_context("fork")


def GPU(task: Callable[..., Any], *, duration: Any = None) -> Callable[..., Any]:  # noqa: N802 (the name that spaces has)
    def lent(*args: Any) -> Iterator[Any]:
        seconds = duration(*args) if callable(duration) else duration
        with Path(os.environ["SPACES_LOG"]).open("a", encoding="utf-8") as log:
            log.write(f"{seconds}\n")
        ours, theirs = _FORK.Pipe(duplex=False)
        process = _FORK.Process(target=_run, args=(task, pickle.dumps(args), theirs), daemon=True)
        process.start()
        theirs.close()
        try:
            while True:
                kind, value = ours.recv()
                if kind == "end":
                    return
                if kind == "error":
                    raise gr.Error(value, title="ZeroGPU worker error")
                yield value
        except EOFError:
            raise gr.Error("GPU task aborted", title="ZeroGPU worker error") from None
        finally:
            process.join(10)

    return lent


def _run(task: Callable[..., Any], arguments: bytes, results: Connection) -> None:
    os.environ["ON_LENT_GPU"] = "yes"
    try:
        for value in task(*pickle.loads(arguments)):
            results.send(("value", value))
        results.send(("end", None))
    except Exception as error:
        results.send(("error", type(error).__name__))
