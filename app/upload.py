"""Gradio's file component, reduced to files that were uploaded to this server."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn
from urllib.parse import unquote

import gradio as gr
from gradio.data_classes import FileData, ListFiles

from app.disk import Disk
from model.types import InputError

_SERVED = "/gradio_api/file="  # before the path, in the address of an upload
_NO_FILE = "Upload the video file itself, please; this is no file that was uploaded here."


def only_uploads(component: gr.File) -> gr.File:
    """Keep a file component from fetching addresses and from writing files of its own."""
    # On the instance: of a subclass Gradio would write a stub beside this very file.
    usual = component.async_move_resource_to_block_cache

    async def move(url_or_file_path: str | Path | None) -> str | None:
        # Gradio would download it; addresses have a way of their own, with a guard.
        if url_or_file_path is not None and "://" in str(url_or_file_path):
            return _at_our_address(str(url_or_file_path), Path(component.GRADIO_CACHE))
        return await usual(url_or_file_path)

    def preprocess(payload: ListFiles | FileData | None) -> str | None:
        if payload is None:
            return None
        if not isinstance(payload, FileData):
            refuse()
        return str(payload.path)

    component.async_move_resource_to_block_cache = move
    component.preprocess = preprocess
    return component


def _at_our_address(url: str, uploads: Path) -> str:
    """The path of an upload that is named by the address under which Gradio serves it.

    MCP clients name uploads so. Nothing is fetched: only the path in the address is looked at.
    """
    path = Path(unquote(url.partition(_SERVED)[2]))
    try:
        inside = path.resolve(strict=True).is_relative_to(uploads.resolve())
    except (OSError, ValueError, RuntimeError):
        inside = False
    return str(path) if inside else refuse()


def refuse() -> NoReturn:
    """Say that something else than an uploaded file came."""
    raise gr.Error(_NO_FILE, print_exception=False)


def uploaded(path: str, disk: Disk) -> Path:
    """The path of an uploaded file; raises `InputError` for any other, links included."""
    try:
        real = Path(path).resolve(strict=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError("The file did not arrive; please upload it again.") from error
    # Behind Gradio's own check, which depends on what the caller says about the file.
    if not real.is_relative_to(disk.uploads.resolve()) or Path(path).is_symlink():
        raise InputError(_NO_FILE)
    return real
