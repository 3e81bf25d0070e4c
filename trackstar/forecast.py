"""How many tokens a corpus has, estimated in the background, so that a build can say how long it will take.

Contract: a thread reads the corpus once, counting characters, and tokenises a sample of documents spread over all of
it. Until it has come to the end nothing is known. A corpus that cannot be read gives no estimate and no error: the
build meets the same trouble and reports it. Remote corpora are not read twice, so they get no estimate either.
"""

from __future__ import annotations

import logging
import threading

import numpy as np

from trackstar.corpus import Corpus, CorpusConfig

_SAMPLE = 256
_log = logging.getLogger(__name__)


class TokenForecast:
    """The estimated number of tokens of a corpus, begin tokens included."""

    def __init__(self, config: CorpusConfig, model: str) -> None:
        self._tokens: int | None = None
        self._config = config
        self._model = model
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="token-forecast", daemon=True)

    def tokens(self) -> int | None:
        """The estimate, None until it is known; counting begins with the first call."""
        if self._thread.ident is None and not any("://" in path for path in self._config.paths):
            self._thread.start()
        return self._tokens

    @property
    def running(self) -> bool:
        """Whether it is counting now."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Stop counting and wait for the thread."""
        self._stopped.set()
        if self.running:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._tokens = self._count()
        except Exception as error:
            _log.debug("no forecast of the number of tokens: %s", error)

    def _count(self) -> int | None:
        from transformers import AutoTokenizer

        generator = np.random.Generator(np.random.Philox(key=2))
        sample: list[str] = []
        documents = characters = 0
        for document in Corpus(self._config).documents():
            if self._stopped.is_set():
                return None
            documents += 1
            characters += len(document.text)
            if len(sample) < _SAMPLE:
                sample.append(document.text)
            elif (slot := int(generator.integers(0, documents))) < _SAMPLE:
                sample[slot] = document.text
        tokenizer = AutoTokenizer.from_pretrained(self._model, local_files_only=True)
        encoded = tokenizer(sample, add_special_tokens=False, verbose=False)["input_ids"]
        per_character = sum(len(ids) for ids in encoded) / sum(len(text) for text in sample)
        return round(characters * per_character) + documents
