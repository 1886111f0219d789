"""LongBench (arXiv 2308.14508) from a user's own copy of it: `<dataset>.jsonl` files and its two files of settings.

dataset2prompt.json holds a template for each dataset, dataset2maxlen.json how many tokens an answer may have. Both are
looked for in the folder and in its `config`, the datasets in the folder and in its `data`. Nothing is downloaded.

A prompt that is longer than the model's room loses its middle, as in LongBench's own script, which cuts before it puts
the chat template around the prompt and here the room includes it. That script also ends samsum's answers at a newline
that is not their first token; here the first-line rule of the scores leaves the rest out.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from string import Formatter
from typing import Any

from fastkv.console.files import read_json
from fastkv.console.jsonl import checksum, read_objects
from fastkv.errors import FastKVError
from fastkv.eval.example import Draw, Example, Task
from fastkv.eval.fitting import adjust
from fastkv.eval.longbench import LONGBENCH, METRICS, WITHOUT_CHAT, longbench_score

ALL = "longbench"  # the task name that stands for every dataset that is there
SETTING = "longbench"
_HOLDS = "input, context, answers and all_classes"


def is_longbench(name: str) -> bool:
    """Whether a task is one of LongBench's, or all of them."""
    return name == ALL or name.startswith(LONGBENCH)


def longbench_tasks(name: str, folder: Path) -> list[Task]:
    """The tasks of `longbench`, which is every dataset of the folder, or of `longbench:` and a dataset.

    Raises FastKVError for a dataset that is unknown, not there or broken, and where its metric's package is missing.
    """
    if not folder.is_dir():
        raise FastKVError(f"{folder}: there is no such folder", setting=SETTING)
    templates, longest = (_settings(folder, f"dataset2{what}.json") for what in ("prompt", "maxlen"))
    if name != ALL:
        return [_task(folder, name.removeprefix(LONGBENCH), templates, longest)]
    found = [dataset for dataset in METRICS if _find(folder, "data", f"{dataset}.jsonl") is not None]
    if not found:
        raise FastKVError(f"{folder}: has no dataset of LongBench, such as qasper.jsonl", setting=SETTING)
    return [_task(folder, dataset, templates, longest) for dataset in found]


def _task(folder: Path, dataset: str, templates: dict[str, Any], longest: dict[str, Any]) -> Task:
    if dataset not in METRICS:
        message = f"{LONGBENCH}{dataset}: is no dataset of LongBench; there are {', '.join(METRICS)}"
        raise FastKVError(message, setting="task")
    path = _find(folder, "data", f"{dataset}.jsonl")
    template, max_new_tokens = templates.get(dataset), longest.get(dataset)
    if path is None:
        raise FastKVError(f"{folder}: has no {dataset}.jsonl, neither itself nor in its data", setting=SETTING)
    if not isinstance(template, str):
        raise FastKVError(f"{folder}: dataset2prompt.json has no template for {dataset}", setting=SETTING)
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise FastKVError(f"{folder}: dataset2maxlen.json has no number of tokens for {dataset}", setting=SETTING)
    score = partial(longbench_score, dataset)
    try:
        score("1", Example("", ("Paragraph 1 段落1",), classes=("1",)))  # before a model has answered for hours
    except FastKVError as error:
        raise FastKVError(f"{LONGBENCH}{dataset}: {error}", setting="task") from None
    lines, source = read_objects(path, SETTING, _HOLDS)
    examples = [_example(where, dataset, template, fields) for where, fields in lines]
    return Task(
        f"{LONGBENCH}{dataset}",
        f"{dataset} of LongBench",
        score,
        max_new_tokens,
        lambda draw: write(draw, examples[draw.slot.index]),
        has_length=False,
        source=checksum(f"{source} {max_new_tokens} {template}".encode()),
        most=len(examples),
    )


def write(draw: Draw, example: Example) -> Example:
    """The example, without as much of its prompt's middle as the room asks for: two halves of its tokens are left."""
    ids = draw.encode(example.prompt)

    def shortened(keep: int) -> Example | None:
        half = keep // 2
        tail = draw.decode(ids[-half:]) if half else ""
        text = draw.decode(ids[:half]) + tail if half else ""
        return replace(example, prompt=text, cut=True, question=_end(text, example.question, tail)) if text else None

    if draw.count(example) <= draw.limit:
        return example
    return adjust(draw, shortened, len(ids) + draw.limit - draw.count(example))


def _example(where: str, dataset: str, template: str, fields: dict[str, Any]) -> Example:
    answers = _strings(fields.get("answers"))
    classes = _strings(fields.get("all_classes"))
    if not answers:
        raise FastKVError(f"{where}: answers must be a list of strings", setting=SETTING)
    if dataset in ("trec", "lsht") and not classes:
        raise FastKVError(f"{where}: all_classes must be a list of strings for {dataset}", setting=SETTING)
    try:
        text, asked = fill(template, fields)
        example = Example(text, answers, chat=dataset not in WITHOUT_CHAT, classes=classes, question=asked)
        longbench_score(dataset, "", example)  # some metrics look for something in the answer
    except FastKVError as error:
        raise FastKVError(f"{where}: {error}", setting=SETTING) from None
    return example


def fill(template: str, fields: dict[str, Any]) -> tuple[str, str]:
    """The template with `{name}` replaced by that field, `{{` and `}}` by a brace, and its question.

    That is what stands after `{context}`, and "" where there is none, or where `{input}` stands before it alone. Raises
    FastKVError for a name that is no field.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise FastKVError(f"its template in dataset2prompt.json cannot be read ({error})") from None
    text, names, begins = list[str](), list[str | None](), 0
    for literal, name, spec, conversion in parts:
        value = fields.get(name) if name else ""
        if spec or conversion or name == "" or not isinstance(value, (str, int)):
            raise FastKVError(f"there is no text for {{{name}}} of its template in dataset2prompt.json")
        text += [literal, str(value)]
        names.append(name)
        begins = len(text) if name == "context" else begins
    before, after = names[: begins // 2], names[begins // 2 :]
    asks = begins > 0 and ("input" in after or "input" not in before)
    return "".join(text), "".join(text[begins:]).strip() if asks else ""


def _end(text: str, question: str, tail: str) -> str:
    """What is left of a question at the end of a text of which `tail` is the second half; "" if that cannot be told."""
    if text.rstrip().endswith(question):
        return question
    return tail.strip() if question.endswith(tail.strip()) else ""


def _settings(folder: Path, name: str) -> dict[str, Any]:
    path = _find(folder, "config", name)
    if path is None:
        raise FastKVError(f"{folder}: has no {name}, neither itself nor in its config", setting=SETTING)
    return read_json(path, SETTING, "an entry for each dataset")


def _find(folder: Path, inside: str, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / inside / name) if path.exists()), None)


def _strings(value: Any) -> tuple[str, ...]:
    """The strings of a list; none for anything else."""
    whole = isinstance(value, list) and all(isinstance(one, str) for one in value)
    return tuple(value) if whole else ()
