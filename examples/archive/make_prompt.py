"""Writes a prompt: an archive text of a wanted length, then a question about one record at a wanted depth.

    python make_prompt.py --tokens 3000 --depth 0.5 --seed 1 --out prompt.txt --answer-file answer.txt

The expected code goes to --answer-file, or to stderr as `answer: 5831`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from arguments import Parser, integer, number, span
from encoding import MAX_DIGITS, load_encode

from fastkv.eval.example import Example
from fastkv.eval.tasks.archive import make_prompt

TOKENIZER = Path(__file__).parent / "model" / "tokenizer.json"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(description="Write a prompt that asks for one access code of a long text.")
    parser.add_argument("--tokens", type=integer(64), default=3000, help="about how long, in tokens (3000)")
    parser.add_argument("--depth", type=number(0, 1), default=0.5, help="where the asked record lies, 0 to 1 (0.5)")
    parser.add_argument(
        "--records", type=integer(1, 2000), help="how many records (drawn: 10 to 60 %% of the text, 3 to 48)"
    )
    parser.add_argument(
        "--digits",
        type=integer(1, MAX_DIGITS),
        nargs="+",
        default=[4],
        help="of a code: a number, or the fewest and the most (4)",
    )
    parser.add_argument("--seed", type=integer(0), default=0, help="fixes the text (0)")
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER, help="a tokenizer.json (the bundled model's)")
    parser.add_argument("--out", type=Path, help="the prompt file, ending in a newline (stdout, as it is)")
    parser.add_argument("--answer-file", type=Path, help="where the expected code goes (stderr)")
    args = parser.parse_args(arguments)
    try:
        encode = load_encode(args.tokenizer)
        prompt = make_prompt(encode, args.tokens, args.depth, args.seed, args.records, span("--digits", args.digits))
        write(prompt, args.out, args.answer_file)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


def write(prompt: Example, out: Path | None, answer_file: Path | None) -> None:
    # A file gets the newline that text files end in; a reader of a prompt file drops one.
    if out is None:
        sys.stdout.write(prompt.text)
    else:
        out.write_text(prompt.text + "\n", encoding="utf-8")
    if answer_file is None:
        print(f"answer: {prompt.answers[0]}", file=sys.stderr)
    else:
        answer_file.write_text(prompt.answers[0] + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
