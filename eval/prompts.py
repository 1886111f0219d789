"""From an example to the token ids that every policy is given: plain, or as a message in the model's chat template."""

from __future__ import annotations

from fastkv.engine.llm import LLM
from fastkv.errors import FastKVError
from fastkv.eval.example import Example


class Prompts:
    """The model's own tokenizer, and its chat template where `chat`. Raises FastKVError where it has none."""

    def __init__(self, llm: LLM, chat: bool = False) -> None:
        if llm.tokenizer is None:
            raise FastKVError("the model has no tokenizer, and a task is a text", setting="model")
        self._llm, self._tokenizer, self._chat = llm, llm.tokenizer, chat
        self._added = len(llm.tokenizer.encode(""))  # BOS, and what else the model's files ask for

    def ids(self, example: Example) -> list[int]:
        """Token ids of the prompt and the beginning of its answer, which a chat template puts into the model's turn."""
        if self._chat and example.chat:
            return self._llm.chat([{"role": "user", "content": example.prompt}]) + self.bare(example.lead.lstrip())
        return self._tokenizer.encode(example.text)

    def count(self, example: Example) -> int:
        return len(self.ids(example))

    def bare(self, text: str) -> list[int]:
        """Ids of a text without BOS: as many as the text takes inside a prompt."""
        return self._tokenizer.encode(text)[self._added :] if text else []

    def text(self, ids: list[int]) -> str:
        """The text of ids; special tokens give nothing."""
        return self._tokenizer.decode(ids)
