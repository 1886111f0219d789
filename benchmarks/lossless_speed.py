"""Decode speed of --lossless beside that of the full cache, on the same prompts, and whether the tokens are the same.

    python benchmarks/lossless_speed.py --model FOLDER --draft-weights int8 --lengths 2048 8192 --prompts 25

A prompt is a part of this repository's own pages (or of --text), with a request to sum it up, in the model's chat
template where it has one. Each is answered twice, greedily: by policy full, then with speculation. Speeds count the
tokens after the first. c and v are what a drafted token and a verification took, in plain steps of the same answers;
--json writes every single figure.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkv.console.files import check_replaceable, write_whole
from fastkv.console.load import load_model
from fastkv.console.parser import Parser, guarded
from fastkv.errors import FastKVError, check_integer

if TYPE_CHECKING:
    from fastkv import LLM

ROOT = Path(__file__).resolve().parent.parent
REQUEST = "Tell in a few sentences what the text above says."


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="lossless_speed.py", description="Decode speed of --lossless beside that of the full cache.")
    made.add_argument("--model", required=True, help="a model folder")
    made.add_argument(
        "--lengths", type=int, nargs="+", default=[2048], metavar="N", help="tokens of the prompts (2048)"
    )
    made.add_argument("--prompts", type=int, default=5, metavar="N", help="of each length (5)")
    made.add_argument("--new-tokens", type=int, default=128, metavar="N", help="of each answer (128)")
    made.add_argument("--speculation", default="self", metavar="KIND", help="self (default) or ngram")
    made.add_argument(
        "--draft-weights", default=None, metavar="int8|int4", help="of a copy that drafts (default: none)"
    )
    made.add_argument("--draft-tokens", type=int, default=None, metavar="N", help="at a time (default: as many as pay)")
    made.add_argument("--kv-retention", type=float, default=0.1, metavar="R", help="of FastKV, which drafts (0.1)")
    made.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="what the prompts are parts of")
    made.add_argument("--compile", action="store_true")
    made.add_argument("--threads", type=int, default=None, metavar="N")
    made.add_argument("--device", default="auto", metavar="D")
    made.add_argument("--dtype", default="auto", metavar="T")
    made.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    return made


def prompts(llm: LLM, files: list[Path], length: int, count: int) -> list[Any]:
    """Token ids of `count` prompts of about `length` tokens, from places that are evenly spread over the texts."""
    assert llm.tokenizer is not None
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    ids = llm.tokenizer.encode(text)
    room = length - 64  # for the request, and the chat template
    if len(ids) < room + count:
        raise FastKVError(
            f"the texts have {len(ids):,} tokens, too few for prompts of {length:,}: give more with --text"
        )
    starts = [index * (len(ids) - room) // max(1, count - 1) for index in range(count)]
    made = []
    for start in starts:
        asked = f"{llm.tokenizer.decode(ids[start : start + room])}\n\n{REQUEST}"
        try:
            made.append(llm.chat([{"role": "user", "content": asked}]))
        except FastKVError:  # no template
            made.append(llm.tokenizer.encode(asked))
    return made


def compared(llm: LLM, prompt: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one prompt."""
    from fastkv import FastKV, FullKV, SamplingParams

    params = SamplingParams(max_tokens=args.new_tokens)
    policy = FastKV(kv_retention=args.kv_retention) if args.speculation == "self" else FullKV()
    plain = llm.generate(prompt, params, FullKV())
    found = llm.generate(prompt, params, policy, speculation=args.speculation, draft_tokens=args.draft_tokens)
    spec = found.metrics.speculation
    assert spec is not None
    speeds = [each.metrics.decode_tokens_per_s for each in (plain, found)]
    return {
        "tokens": len(prompt),
        "new_tokens": len(plain.token_ids),
        "identical": plain.token_ids == found.token_ids,
        "full_tokens_per_s": speeds[0],
        "tokens_per_s": speeds[1],
        "speed_up": None if None in speeds else speeds[1] / speeds[0],
        "acceptance": spec.acceptance,
        "tokens_per_verification": spec.tokens_per_verification,
        "verifications": spec.verifications,
        "plain_steps": spec.plain_steps,
        "drafted_tokens": spec.drafted_tokens,
        "accepted_tokens": spec.accepted_tokens,
        "told_speed_up": spec.speed_up,
        "c": _of_plain(spec.draft_seconds, spec.drafted_tokens, spec.plain_seconds),
        "v": _of_plain(spec.verify_seconds, spec.verifications, spec.plain_seconds),
        "full_kv_bytes": found.metrics.kv_bytes,
        "draft_kv_bytes": spec.draft_kv_bytes,
        "draft_weight_bytes": spec.draft_weight_bytes,
    }


def _of_plain(seconds: float, count: int, plain: float | None) -> float | None:
    """What one of `count` took, in plain steps."""
    return None if plain is None or not count else seconds / count / plain


def told(length: int, rows: list[dict[str, Any]]) -> str:
    """A line of a table."""
    ratios = [row["speed_up"] for row in rows if row["speed_up"] is not None]
    drafted, accepted = (sum(row[name] for row in rows) for name in ("drafted_tokens", "accepted_tokens"))
    verified = sum(row["verifications"] for row in rows)
    full, mine = (statistics.median(row[name] or 0 for row in rows) for name in ("full_tokens_per_s", "tokens_per_s"))
    cells = [
        f"{length:,}",
        f"{sum(row['identical'] for row in rows)} of {len(rows)}",
        f"{full:.1f}",
        f"{mine:.1f}",
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} – {max(ratios):.2f})" if ratios else "not measured",
        f"{100 * accepted / drafted:.0f} %" if drafted else "none drafted",
        f"{1 + accepted / verified:.2f}" if verified else "none",
        *(_median([row[name] for row in rows]) for name in ("c", "v")),
    ]
    return "| " + " | ".join(cells) + " |"


def _median(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.2f}" if known else "not measured"


COLUMNS = (
    *("prompt", "identical", "full, tokens/s", "lossless, tokens/s", "speed-up", "accepted", "tokens a verification"),
    *("c", "v"),
)
HEAD = f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}"


def run(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    for name in ("prompts", "new_tokens"):
        check_integer(name, getattr(args, name), 1)
    if args.json is not None:
        check_replaceable(args.json, "json")

    from machine import machine

    settings = {"compile": args.compile, "draft_weights": args.draft_weights}
    llm = load_model(args.model, args.threads, device=args.device, dtype=args.dtype, **settings)
    files = args.text or sorted((ROOT / "docs").glob("*.md"))
    each: dict[int, list[dict[str, Any]]] = {}
    about = {**machine(llm), "command": shlex.join(["python", "benchmarks/lossless_speed.py", *argv])}
    print(f"{about['device']}, {about['date']}, {about['dtype']}\n\n{HEAD}")
    for length in args.lengths:
        made = prompts(llm, files, length, args.prompts)
        compared(llm, made[0], args)  # kernels are chosen
        each[length] = [compared(llm, prompt, args) for prompt in made]
        print(told(length, each[length]), flush=True)
        if args.json is not None:
            write_whole(args.json, json.dumps({**about, "rows": each}, indent=1) + "\n", "json")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    return guarded("lossless_speed.py", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
