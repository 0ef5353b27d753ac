"""Checkpoint folders: fetched from the hub, read and written one tensor at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model.types import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
WANTED = ["*.json", "*.safetensors", "*.jinja", "*.txt"]  # what is fetched from a hub repository
SHARD_BYTES = 1 << 30
_WHOLE_BYTES = 1 << 30  # of weights that are summed up whole
_SAMPLE_BYTES = 4 << 20


def local_folder(source: str | Path) -> Path:
    """A checkpoint's folder: `source` itself, or fetched from the hub when it is an id.

    Raises:
        InputError: there is neither a folder nor a hub repository of that name.

    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{folder} is a file; expected a checkpoint's folder or a hub id.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), allow_patterns=WANTED))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"There is no folder {str(source)!r}, and it could not be fetched from the hub "
            f"({type(error).__name__}); check the name or the connection, or download the "
            "repository elsewhere and give its folder."
        ) from error


def revision(folder: Path) -> str:
    """Name a checkpoint's weights: `commit:` and a hub snapshot's hash, or `sha256:` of the files.

    Of large files only the first and last megabytes and the size go into the sum: it tells
    checkpoints apart within a second, and is marked `sha256-sampled:`.
    """
    if folder.parent.name == "snapshots":
        return f"commit:{folder.name}"
    files = sorted(folder.glob("*.safetensors"))
    sampled = sum(file.stat().st_size for file in files) > _WHOLE_BYTES
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as weights:
            if sampled:
                size = file.stat().st_size
                digest.update(f"{file.name} {size}".encode() + weights.read(_SAMPLE_BYTES))
                weights.seek(max(0, size - _SAMPLE_BYTES))
                digest.update(weights.read())
            else:
                while part := weights.read(_SAMPLE_BYTES):
                    digest.update(part)
    return f"sha256{'-sampled' if sampled else ''}:{digest.hexdigest()}"


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """One JSON file of a checkpoint.

    Raises:
        InputError: it is missing or no JSON object.

    """
    file = folder / name
    if not file.is_file():
        raise InputError(f"{folder} holds no {name}; download the checkpoint again, completely.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{file} is damaged ({error}); download it again.") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} should hold a JSON object; download it again.")
    return content


class CheckpointReader:
    """The tensors of a folder with `model.safetensors`, or shards and their index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files, indexed = self._files()
        self._files_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            with _opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (no mapping: cannot be iterated)
                    self._files_of[name] = file
                    self.shapes[name] = tuple(tensors.get_slice(name).get_shape())
        absent = sorted(indexed - self.shapes.keys())
        if absent:
            raise InputError(
                f"{folder / INDEX} promises weights that its files do not hold: {some(absent)}; "
                "download the checkpoint again, completely."
            )

    def _files(self) -> tuple[list[Path], set[str]]:
        """Weight files, and the names that an index promises."""
        if (self.folder / INDEX).is_file():
            weight_map = read_json(self.folder, INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise InputError(f"{self.folder / INDEX} lists no weights; download it again.")
            # Only plain names: an index from elsewhere must not reach out of its folder.
            names = sorted({Path(str(name)).name for name in weight_map.values()})
            missing = [name for name in names if not (self.folder / name).is_file()]
            if missing:
                raise InputError(
                    f"{self.folder} lacks {some(missing)}, {len(missing)} of {len(names)} weight "
                    f"files that {INDEX} lists; download what is missing."
                )
            return [self.folder / name for name in names], set(weight_map)
        if (self.folder / SINGLE).is_file():
            return [self.folder / SINGLE], set()
        pickled = sorted(file.name for file in self.folder.glob("*.bin"))
        hint = f" (found only {some(pickled)}, which are not read)" if pickled else ""
        raise InputError(
            f"{self.folder} holds no {SINGLE} and no {INDEX}{hint}; download the checkpoint's "
            "safetensors files."
        )

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor by name."""
        with _opened(self._files_of[name]) as tensors:
            return tensors.get_tensor(name)

    def tensors(self, names: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Chosen tensors, file by file; only the one at hand is in memory."""
        for file in sorted(set(self._files_of.values())):
            with _opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (no mapping: cannot be iterated)
                    if name in names:
                        yield name, tensors.get_tensor(name)


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{file} cannot be read as safetensors ({error}); it is damaged or incomplete, "
            "download it again."
        ) from error


class ShardWriter:
    """Writes tensors as they come into shards of bounded size, in transformers' layout."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.total_bytes = 0
        self._waiting: dict[str, torch.Tensor] = {}
        self._waiting_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor; a full shard is written at once."""
        size = tensor.numel() * tensor.element_size()
        if self._waiting and self._waiting_bytes + size > self.shard_bytes:
            self._flush()
        self._waiting[name] = tensor.contiguous()
        self._waiting_bytes += size
        self.total_bytes += size

    def close(self) -> None:
        """Write what is left, give the files their final names and write the index."""
        if self._waiting:
            self._flush()
        count = len(self._shards)
        weight_map = {}
        for i, names in enumerate(self._shards):
            final = SINGLE if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            self._file(i).rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _flush(self) -> None:
        save_file(self._waiting, self._file(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._waiting))
        self._waiting, self._waiting_bytes = {}, 0

    def _file(self, number: int) -> Path:
        return self.folder / f"shard-{number}.safetensors"


def some(names: list[str], most: int = 6) -> str:
    """The first names of a list and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
