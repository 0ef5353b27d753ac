"""One answer, generated in a thread of its own, as pieces of text that never change once shown."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import torch
from transformers import Cache, PreTrainedTokenizerBase

from model.decoding import decode
from model.guards import repeats
from model.modeling_crosslmm import CrossLMMForConditionalGeneration
from model.types import Piece, StopCheck, Stopped


class Generation:
    """Greedy decoding of one answer to `prompt` (1, n), the text after the video in `cache`.

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
        self._crosslmm, self._tokenizer = crosslmm, tokenizer
        self._prompt, self._cache = prompt, cache
        self._limit, self._stop = limit, stop
        self._events: queue.Queue[Piece | None] = queue.Queue()
        self._left = threading.Event()  # the caller went away in the middle
        self.ids: list[int] = []  # the tokens so far, special ones included
        self.text = ""  # all that was shown
        self.first_token: float | None = None  # `time.perf_counter()` at it
        self.repeated = False  # whether it was ended for repeating itself

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
        ends = self._crosslmm.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else ends or []
        tokens = decode(self._crosslmm, self._prompt, self._cache, self._limit, ends)
        try:
            with closing(tokens):
                for token in tokens:
                    self._add(token)
                    if self.repeated or self.stopping():
                        break
        except BaseException as error:  # raised again in the caller's thread
            failure.append(error)
        finally:
            self._events.put(None)

    def _add(self, token: int) -> None:
        if self.first_token is None:
            self.first_token = time.perf_counter()
        self.ids.append(token)
        self.repeated = repeats(self.ids)
        text = self._tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("\ufffd") and len(text) > len(self.text):
            self._events.put(Piece(text[len(self.text) :]))
            self.text = text
