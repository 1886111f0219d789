"""Renders a chat template, in a process of its own (template_process.py) and in Jinja's sandbox.

The template came with a model folder and may be anyone's program. The sandbox keeps it from files and from Python's
insides; the system keeps this process from taking more memory and time than it may. So this file imports nothing of the
package, and is run as a script: lines of JSON in, a line of JSON out for each.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from datetime import datetime
from typing import Any

_BASE = 2**29  # bytes of memory for a short conversation
_BYTES_FOR_EACH = 40  # of the conversation
_LONGEST = 2**22  # characters of text, besides as many as the conversation has, eight times


def main() -> None:
    """First the search path, the template's text and its limits, then requests until there are none."""
    asked, answers = sys.stdin.buffer, sys.stdout.buffer
    first = json.loads(asked.readline())
    sys.path[:] = first["path"]
    program = _Program(first["template"])
    for line in asked:
        _limit(len(line), first["seconds"])
        answers.write(json.dumps(program.answer(json.loads(line), len(line))).encode() + b"\n")
        answers.flush()


class _Program:
    """A template, compiled when it is first asked for: compiling alone can take any time and memory."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._template: Any = None
        self._uses: set[str] = set()

    def answer(self, request: dict[str, Any], size: int) -> dict[str, str]:
        """{"text": …}, or {"broken": …} for what cannot be compiled and {"refused": …} for what cannot be rendered."""
        try:
            if self._template is None:
                self._compile()
        except Exception as error:  # a template is somebody's program: its compilation can fail in any way
            return {"broken": _said(error)}
        unused = [name for name in request["arguments"] if name not in self._uses]
        if unused:
            return {"unused": unused[0]}
        try:
            return {"text": self._render(request["variables"], _LONGEST + 8 * size)}
        except Exception as error:  # and so can its run
            return {"refused": _said(error)}

    def _compile(self) -> None:
        from jinja2 import meta

        environment = _environment()
        self._uses = meta.find_undeclared_variables(environment.parse(self._source))
        self._template = environment.from_string(self._source)

    def _render(self, variables: dict[str, Any], longest: int) -> str:
        parts, length = [], 0
        for part in self._template.generate(**variables):
            parts.append(part)
            length += len(part)
            if length > longest:
                raise ValueError(f"it writes more than {longest:,} characters")
        return "".join(parts)


def _said(error: Exception) -> str:
    return str(error)[:500] or type(error).__name__


def _limit(size: int, seconds: float) -> None:
    """Let this process end where it takes more than it may for a conversation of `size` bytes; on Unix."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        memory = _BASE + _BYTES_FOR_EACH * size
        resource.setrlimit(resource.RLIMIT_AS, (memory if hard < 0 else min(hard, memory), hard))
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        used = resource.getrusage(resource.RUSAGE_SELF)
        until = int(used.ru_utime + used.ru_stime + seconds + 1 + size / 2**20)
        resource.setrlimit(resource.RLIMIT_CPU, (until if hard < 0 else min(hard, until), hard))


def _environment() -> Any:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _generation_tag()]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes for HTML, which a prompt is not. The order of the arguments is that of transformers.
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, separators=separators, sort_keys=sort_keys)


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


if __name__ == "__main__":
    main()
