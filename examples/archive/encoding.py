"""The tokenizer as a function from text to token ids."""

from __future__ import annotations

from pathlib import Path

from fastkv.eval.tasks.archive import Encode

MAX_DIGITS = 20  # of a code, each of which is a token


def load_encode(path: Path) -> Encode:
    """The tokenizer of a `tokenizer.json`. Raises ValueError where it cannot be read."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"{path}: not a tokenizer that can be read ({error})") from None
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids
