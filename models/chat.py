"""A model's chat template, rendered in Jinja's sandbox: it comes with the model folder and is not trusted."""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

from fastkv.errors import FastKVError
from fastkv.models.fields import Fields


class ChatIds(list[int]):
    """Token ids of a conversation. tail: how many of the last ones the template wrote after the last message."""

    tail: int = 0


def written_after(text: str, messages: list[dict[str, str]]) -> str:
    """The end of a rendered conversation that is the template's alone; "" if the last message is not found in it."""
    last = messages[-1].get("content") if messages else None
    words = last.strip() if isinstance(last, str) else ""
    place = text.rfind(words) if words else -1
    return "" if place < 0 else text[place + len(words) :]


class ChatTemplate:
    """Turns messages into the text that a model was trained to continue."""

    def __init__(self, source: str, path: Path) -> None:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.path = path
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _generation_tag()]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # a template is somebody's program: its compilation can fail in any way
            raise FastKVError(f"{path}: the chat template is broken ({error})") from None

    @classmethod
    def from_pretrained(cls, folder: Path, fields: Fields) -> ChatTemplate | None:
        """`chat_template.jinja` if it is there, else `chat_template` of tokenizer_config.json, else None."""
        file = folder / "chat_template.jinja"
        if os.path.lexists(file):
            try:
                return cls(file.read_text(encoding="utf-8"), file)
            except (OSError, UnicodeDecodeError) as error:
                raise FastKVError(f"{file}: cannot be read ({error})") from None
        stated = fields.get("chat_template", None)
        if isinstance(stated, list):
            stated = _default_template(fields, stated)
        if stated is None:
            return None
        if not isinstance(stated, str):
            raise fields.complain("chat_template", "a string, or a list of named templates")
        return cls(stated, Path(fields.source))

    def render(self, messages: list[dict[str, str]], bos_token: str, eos_token: str) -> str:
        """The conversation as text, ending where the model's answer begins; FastKVError if the template refuses."""
        try:
            return self._template.render(
                messages=messages,
                bos_token=bos_token,
                eos_token=eos_token,
                add_generation_prompt=True,
                tools=None,
                documents=None,
            )
        except Exception as error:  # and so can its run
            raise FastKVError(f"{self.path}: the chat template cannot render these messages ({error})") from None


def _default_template(fields: Fields, named: list[Any]) -> str | None:
    for entry in named:
        if isinstance(entry, dict) and entry.get("name") == "default":
            return entry.get("template")
    raise fields.complain("chat_template", "a list with a template named 'default'")


def _to_json(value: Any, **options: Any) -> str:
    # Jinja's own filter escapes for HTML, which a prompt is not.
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _generation_tag() -> type[Any]:
    """`{% generation %} … {% endgeneration %}` marks the model's own words for training; here it is its content."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class GenerationTag(Extension):
        tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    return GenerationTag


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)
