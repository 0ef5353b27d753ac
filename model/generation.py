"""One answer, generated in a thread of its own, as pieces of text that never change once shown."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator

import torch
from transformers import Cache, PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from model.guards import EndlessRepetition, FiniteScores
from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.types import Piece, StopCheck, Stopped


class _Pieces(BaseStreamer):
    def __init__(self, tokenizer: PreTrainedTokenizerBase, events: queue.Queue) -> None:
        self.tokenizer = tokenizer
        self.events = events
        self.ids: list[int] = []
        self.shown = ""
        self.first_token: float | None = None
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._prompt:  # generate hands over the prompt first
            self._prompt = False
            return
        if self.first_token is None:
            self.first_token = time.perf_counter()
        self.ids += value.flatten().tolist()
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("\ufffd") and len(text) > len(self.shown):
            self.events.put(Piece(text[len(self.shown) :]))
            self.shown = text

    def end(self) -> None:
        pass


class _StopOn(StoppingCriteria):
    def __init__(self, stop: StopCheck) -> None:
        self.stop = stop

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        return torch.full((len(input_ids),), bool(self.stop()), device=input_ids.device)


class Generation:
    """Greedy decoding of one answer to `prompt` (1, L), whose video is in `cache`.

    It ends at `limit` tokens, when the model ends it or only repeats itself, or when `stop` turns
    true; what was said until then stays.
    """

    def __init__(
        self,
        crosslmm: CrossLMMForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        prompt: torch.Tensor,
        cache: Cache,
        limit: int,
        stop: StopCheck,
    ) -> None:
        self._crosslmm, self._prompt, self._cache = crosslmm, prompt, cache
        self._limit, self._stop = limit, stop
        self._events: queue.Queue = queue.Queue()
        self._pieces = _Pieces(tokenizer, self._events)
        self._repetition = EndlessRepetition(prompt.shape[1])
        self._left = threading.Event()  # the caller went away in the middle

    @property
    def ids(self) -> list[int]:
        """The tokens so far, special ones included."""
        return self._pieces.ids

    @property
    def text(self) -> str:
        """All that was shown."""
        return self._pieces.shown

    @property
    def first_token(self) -> float | None:
        """`time.perf_counter()` at the first token, if there was one."""
        return self._pieces.first_token

    @property
    def repeated(self) -> bool:
        """Whether it was ended for repeating itself."""
        return self._repetition.found

    def stopping(self) -> bool:
        """Whether the caller went away or stopped it."""
        return self._left.is_set() or self._stop()

    def stopped_unheard(self) -> bool:
        """The same before the first token; later, the words said so far are the answer."""
        return self.first_token is None and self.stopping()

    def pieces(self) -> Iterator[Piece]:
        """Generate; raises what went wrong. Closing it ends the thread before it returns."""
        failure: list[BaseException] = []
        thread = threading.Thread(target=self._generate, args=(failure,), daemon=True)
        thread.start()
        try:
            while (piece := self._events.get()) is not None:
                yield piece
        finally:
            self._left.set()  # the cache is rolled back only after its last writer is gone
            thread.join()
        if failure and not isinstance(failure[0], Stopped):
            raise failure[0]

    def _generate(self, failure: list[BaseException]) -> None:
        try:
            with torch.inference_mode():
                self._crosslmm.generate(
                    self._prompt,
                    past_key_values=self._cache,
                    streamer=self._pieces,
                    stopping_criteria=[_StopOn(self.stopping), self._repetition],
                    logits_processor=[FiniteScores()],
                    max_new_tokens=self._limit,
                    do_sample=False,
                )
        except BaseException as error:  # raised again in the caller's thread
            failure.append(error)
        finally:
            self._events.put(None)
