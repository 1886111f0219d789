"""The tasks, one short file for each family, by the name that `--task` takes. A new family is a new file here."""

from __future__ import annotations

from pathlib import Path

from fastkv.errors import FastKVError, check_choice
from fastkv.eval.example import Task
from fastkv.eval.tasks import archive, needle, tracing, words
from fastkv.eval.tasks.longbench import is_longbench, longbench_tasks
from fastkv.eval.tasks.qa import qa_task

GENERATED: dict[str, Task] = {task.name: task for family in (needle, tracing, words, archive) for task in family.TASKS}
NAMES = (*GENERATED, "qa")
SINGLE = ("niah_single", *(name for name in GENERATED if name.endswith("digits")), "niah_words")
COPYING = (*SINGLE, "niah_multikey", "archive")  # one answer, which always stands in the text word for word


def build_tasks(names: list[str], qa_file: Path | None = None, longbench: Path | None = None) -> list[Task]:
    """The tasks of these names, each once. longbench: the folder of the user's copy of LongBench.

    Raises FastKVError for an unknown name, for a task without its files, and for files without their task.
    """
    for name in names:
        if not is_longbench(name):
            check_choice("task", name, (*NAMES, "longbench", "longbench:DATASET"))
    _check_files("qa", "qa" in names, "--qa-file", qa_file, "the questions: give --qa-file FILE.jsonl")
    copy = "a copy of LongBench, which is not downloaded: give --longbench FOLDER"
    _check_files("longbench", any(map(is_longbench, names)), "--longbench", longbench, copy)
    tasks: list[Task] = []
    for name in names:
        if longbench is not None and is_longbench(name):
            tasks += longbench_tasks(name, longbench)
        elif qa_file is not None and name == "qa":
            tasks.append(qa_task(qa_file))
        else:
            tasks.append(GENERATED[name])
    return list({task.name: task for task in tasks}.values())


def _check_files(task: str, asked: bool, flag: str, given: Path | None, needs: str) -> None:
    if asked and given is None:
        raise FastKVError(f"task {task} needs {needs}", setting="task")
    if given is not None and not asked:
        raise FastKVError(f"{flag} is for --task {task}: add it, or leave {flag} out")
