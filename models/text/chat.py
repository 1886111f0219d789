"""A model's chat template: where it stands, what it is given, and what is learnt from what it writes."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastkv.errors import FastKVError
from fastkv.models.fields import Fields
from fastkv.models.files import check_ordinary
from fastkv.models.text.template_process import TemplateEndedError, TemplateProcess

_WORD = "fastkv-9e2c"  # that no template writes: it stands for a message
_OWN = ("messages", "add_generation_prompt")  # variables that only we give


class ChatIds(list[int]):
    """Token ids of a conversation.

    tail: how many of the last ones the template wrote after the last message. ends: ids that end the model's turn,
    because the template itself writes them after an answer.
    """

    tail: int = 0
    ends: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Turn:
    """A rendered conversation. after: its end that is the template's alone."""

    text: str
    after: str


def written_after(text: str, message: object) -> str:
    """The end of a rendered conversation that is the template's alone; "" if its last message is not found in it."""
    words = message.strip() if isinstance(message, str) else ""
    place = text.rfind(words) if words else -1
    return "" if place < 0 else text[place + len(words) :]


class Chat:
    """The chat template of a model folder. It is not looked at before the first conversation.

    source: its text. path: the file that it stands in. trouble: why it cannot be used, where that is known already.
    """

    def __init__(self, source: str | None, path: Path, trouble: FastKVError | None = None) -> None:
        self._path = path
        self._trouble = trouble
        self._process = None if source is None else TemplateProcess(source, path)
        self._after_answer: tuple[str, str] | None = None  # for which arguments, and what it was

    @classmethod
    def of(cls, folder: Path, config: Fields) -> Chat:
        """`chat_template.jinja` if it is there, else `chat_template` of tokenizer_config.json or chat_template.json."""
        file = folder / "chat_template.jinja"
        try:
            if os.path.lexists(file):
                return cls(_read(file), file)
            older = Fields.read_optional(folder / "chat_template.json")
            for fields in (config, older):
                if "chat_template" in fields:
                    return cls(_stated(fields), Path(fields.source))
        except FastKVError as error:  # a model with a broken template continues plain prompts as well as any
            return cls(None, file, error)
        return cls(None, file)

    @property
    def exists(self) -> bool:
        """Whether there is a template, be it broken."""
        return self._process is not None or self._trouble is not None

    def render(self, messages: list[dict[str, str]], named: dict[str, str], arguments: dict[str, Any]) -> Turn:
        """A conversation as text, ending where the model's answer begins.

        named: special tokens. arguments: other variables. Raises FastKVError if there is no template, if it refuses the
        messages, and for an argument that it does not use.
        """
        text = self._text(messages, named, arguments, answer=True)
        if not text:
            raise FastKVError(f"{self._path}: the chat template writes nothing for these messages")
        return Turn(text, self._after_last(text, messages, named, arguments))

    def _after_last(
        self, text: str, messages: list[dict[str, str]], named: dict[str, str], arguments: dict[str, Any]
    ) -> str:
        """The end of `text` that is the template's alone; "" if that cannot be told."""
        last = messages[-1].get("content") if messages else None
        if not isinstance(last, str) or not last.strip() or text.count(last.strip()) == 1:
            return written_after(text, last)
        # A short message may also be a word of the template's: a word that is not stands in for it.
        with suppress(FastKVError):
            stood_in = [*messages[:-1], {**messages[-1], "content": _WORD}]
            return written_after(self._text(stood_in, named, arguments, answer=True), _WORD)
        return ""

    def after_answer(self, named: dict[str, str], arguments: dict[str, Any]) -> str:
        """What the template writes after an answer of the model; "" where it takes none."""
        key = repr(sorted(arguments.items()))
        if self._after_answer is None or self._after_answer[0] != key:
            messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _WORD}]
            try:
                text = self._text(messages, named, arguments, answer=False)
            except TemplateEndedError:
                raise
            except FastKVError:  # some templates take a user's messages alone
                text = ""
            self._after_answer = key, written_after(text, _WORD)
        return self._after_answer[1]

    def _text(
        self, messages: list[dict[str, str]], named: dict[str, str], arguments: dict[str, Any], answer: bool
    ) -> str:
        if self._trouble is not None:
            raise self._trouble
        if self._process is None:
            raise FastKVError(f"{self._path.parent}: no chat template ({self._path.name}), so no chat", setting="chat")
        for name in _OWN:
            if name in arguments:
                raise FastKVError(f"{name} is no argument of a chat template", setting="chat_arg")
        usual = {"tools": None, "documents": None, **named}
        given = {**usual, **arguments, "messages": messages, "add_generation_prompt": answer}
        return self._process.render(given, [name for name in arguments if name not in usual])


def _read(file: Path) -> str:
    check_ordinary(file)
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FastKVError(f"{file}: cannot be read ({error})") from None


def _stated(fields: Fields) -> str:
    """The template of a JSON file: a text, or the one named default of a list of {name, template} or of an object."""
    stated = fields.get("chat_template")
    if isinstance(stated, list):
        named = {each.get("name"): each.get("template") for each in stated if isinstance(each, dict)}
    else:
        named = stated if isinstance(stated, dict) else {"default": stated}
    template = named.get("default")
    if not isinstance(template, str):
        raise fields.complain("chat_template", "a template, or several of which one has the name 'default'")
    return template
