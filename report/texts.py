"""The text of each token of a prompt, such that the texts together are the prompt's text.

Knows only a function that decodes ids. A character may take several tokens: it is the text of the last of them, and
the others are marked as pieces of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastkv.models.detokenizer import Detokenizer

TEXT, PIECE, SPECIAL = "t", "p", "s"  # kinds of token: has a text, is a part of a character, decodes to nothing

_PATIENCE = 16  # tokens without a text in a row; no character is that long, so a new start loses nothing
_CONTEXT = 32


def token_texts(decode: Callable[[list[int]], str], ids: Sequence[int]) -> tuple[list[str], str]:
    """The text of each token, and the kind of each as one letter of a string.

    Bytes that never become a character have no text: they are pieces of nothing.
    """
    detokenizer = Detokenizer(decode)
    texts: list[str] = []
    kinds: list[str] = []
    silent = 0
    for place, token_id in enumerate(ids):
        text = detokenizer.push(token_id)
        texts.append(text)
        kinds.append(TEXT if text else PIECE if decode([token_id]) else SPECIAL)
        silent = 0 if text else silent + 1
        if silent == _PATIENCE:  # each silent token makes the next one dearer to decode
            detokenizer = Detokenizer(decode, ids[max(0, place + 1 - _CONTEXT) : place + 1])
            silent = 0
    return texts, "".join(kinds)
