"""What ends a turn that went wrong inside the model: memory, broken numbers, endless repetition."""

from __future__ import annotations

import gc

import torch
from transformers import LogitsProcessor, StoppingCriteria

from model.types import ModelFault, StopCheck, Stopped

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


class FiniteScores(LogitsProcessor):
    """Ends generation with a sentence when the model's scores are no numbers any more."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores as they are; raises `ModelFault`."""
        if torch.isnan(scores).any() or not torch.isfinite(scores).any():
            raise ModelFault(
                "The model's numbers broke down on this question (NaN), so there is no answer; "
                "ask differently or use another video."
            )
        return scores


class EndlessRepetition(StoppingCriteria):
    """Ends generation once the answer only repeats itself; `found` tells that it did."""

    def __init__(self, prompt_length: int) -> None:
        self._prompt_length = prompt_length
        self.found = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        """Whether to end, for each of the batch."""
        longest = _LONGEST_PERIOD * (_REPEATS + 1)
        said = input_ids[0, max(self._prompt_length, input_ids.shape[1] - longest) :].tolist()
        self.found = self.found or repeats(said)
        return torch.full((len(input_ids),), self.found, device=input_ids.device)


def repeats(tokens: list[int]) -> bool:
    """Whether the list ends in a phrase said again and again."""
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
