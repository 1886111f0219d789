"""The flags of fastkv-eval's task run, and the texts of its --help and --list."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastkv import __version__
from fastkv.console.parser import Parser, add_machine_flags
from fastkv.eval.cli import COMMANDS
from fastkv.eval.tasks import GENERATED

DEFAULT_POLICIES = ["full", "fastkv"]
DEFAULT_LENGTHS = (1024, 2048, 4096)
DEFAULT_DEPTHS = [0.0, 0.25, 0.5, 0.75, 1.0]
DEFAULT_EXAMPLES = 5

FROM_FILES = {
    "qa": "questions over distractors, from --qa-file",
    "longbench": "every dataset of --longbench, or longbench:qasper … for one",
}
TASK_LIST = "".join(
    f"  {name:<17}{summary}\n"
    for name, summary in {**{t.name: t.summary for t in GENERATED.values()}, **FROM_FILES}.items()
)

EPILOG = f"""\
tasks:
{TASK_LIST}
  --qa-file FILE.jsonl holds one JSON object a line, such as
  {{"question": "Who …?", "answers": ["Ada Lovelace"], "context": "The passage that tells."}}
  --longbench FOLDER is your copy of LongBench: qasper.jsonl and others, there or in its data, dataset2prompt.json and
  dataset2maxlen.json, there or in its config. Nothing is downloaded.

policies:
  --policy full --policy fastkv:kv_retention=0.05,tsp_rate=1
  The first one is the baseline of the differences. Settings are those of fastkv-run, and so are their defaults; several
  values of one stand between slashes, as in fastkv:tsp_layer=2/4,tsp_rate=0.5/0.2. FastKV
  keeps 128 tokens at the least, so a short prompt keeps more than its 10 %: fastkv:min_tokens=8 makes 10 % mean 10 %.

--output FILE.jsonl keeps every answer. The same command with the same file goes on where it was stopped.
{"".join(f"{chr(10)}another command: fastkv-eval {name} --help" for name in COMMANDS if name != "tasks")}
"""


class ListTasks(argparse.Action):
    """--list: print the tasks and leave, whatever else is given or missing."""

    def __call__(self, parser: argparse.ArgumentParser, *args: object, **kwargs: object) -> None:
        print(TASK_LIST, end="")
        parser.exit()


def add_text_flags(group: argparse._ActionsContainer) -> None:
    """Which texts are drawn: the same for every command that only draws them."""
    group.add_argument(
        "--length", type=int, nargs="+", metavar="N", help="prompts of N tokens (default 1024 2048 4096, as fits)"
    )
    group.add_argument(
        "--depth",
        type=float,
        nargs="+",
        default=DEFAULT_DEPTHS,
        metavar="D",
        help="where a single needle lies, 0 to 1 (0 0.25 0.5 0.75 1)",
    )
    group.add_argument("--seed", type=int, default=0, metavar="S", help="fixes every text (0)")


def build_parser() -> Parser:
    parser = Parser(
        prog="fastkv-eval",
        description="Ask a model questions about long texts, under several policies, and compare the answers.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="PATH_OR_ID", help="model folder, or hub id like org/name")
    parser.add_argument("--task", nargs="+", required=True, metavar="NAME", help="one or more of those below")
    parser.add_argument("--list", action=ListTasks, nargs=0, help="print the tasks and exit")
    parser.add_argument("--policy", action="append", metavar="P", help="repeatable (default: full, then fastkv)")
    add_text_flags(parser)
    parser.add_argument(
        "--examples",
        type=int,
        metavar="N",
        help="of each task, length and depth (5); of a LongBench dataset the first N (all)",
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="of an answer (default: the task's own)")
    parser.add_argument("--qa-file", type=Path, metavar="FILE", help="questions of task qa")
    parser.add_argument("--longbench", type=Path, metavar="FOLDER", help="your copy of LongBench")
    parser.add_argument(
        "--longbench-tokens", type=int, metavar="N", help="cut its longer prompts to N tokens (what the model reads)"
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="put prompts into the model's chat template, but for LongBench's few-shot and code datasets",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="keep every answer there, and go on from it")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw PNG pictures there (extra: eval)")
    machine = parser.add_argument_group("machine")
    add_machine_flags(machine)
    machine.add_argument("--quiet", action="store_true", help="nothing but the tables")
    parser.add_argument("--version", action="version", version=f"fastkv-eval {__version__}")
    return parser
