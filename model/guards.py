"""What ends a turn that went wrong inside the model: memory, endless repetition, a long step."""

from __future__ import annotations

import gc

import torch

from model.types import StopCheck, Stopped

_LONGEST_PERIOD = 32  # tokens
_REPEATED_TOKENS = 48  # that many in a row which only repeat, at least ...
_REPEATS = 4  # ... and at least this often


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, on the accelerator or off it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # PyTorch's allocator for the CPU has no class of its own for this.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def free_memory() -> None:
    """Give back what a failed turn left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def repeats(tokens: list[int]) -> bool:
    """Whether the list ends in a phrase said again and again."""
    tokens = tokens[-_LONGEST_PERIOD * (_REPEATS + 1) :]
    for period in range(1, _LONGEST_PERIOD + 1):
        needed = max(_REPEATED_TOKENS, _REPEATS * period)
        if len(tokens) < needed + period:
            continue
        tail = tokens[-needed - period :]
        if tail[period:] == tail[:-period]:
            return True
    return False


class LayerStop:
    """Lets a long step of the model be left between two of its layers.

    While `check` is set and says stop, the next layer raises `Stopped`; what the step was building
    is to be thrown away then.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.check: StopCheck | None = None
        for part in module.modules():
            if isinstance(part, torch.nn.ModuleList):
                for layer in part:
                    layer.register_forward_pre_hook(self._look)

    def _look(self, *_: object) -> None:
        if self.check is not None and self.check():
            raise Stopped("stopped between two layers")
