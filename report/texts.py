"""The text of each token of a prompt, such that the texts together are the prompt's text.

A character may take several tokens: it is the text of the last of them, and the others are marked as pieces of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastkv.models.text.detokenizer import Decoder, Detokenizer

TEXT, PIECE, SPECIAL = "t", "p", "s"  # kinds of token: has a text, is a part of a character, decodes to nothing


def token_texts(tokenizer: Decoder, ids: Sequence[int]) -> tuple[list[str], str]:
    """The text of each token, and the kind of each as one letter of a string.

    Bytes that never become a character show as U+FFFD, at the token after them.
    """
    detokenizer = Detokenizer(tokenizer)
    texts = [detokenizer.push(token_id) for token_id in ids]
    silent = (PIECE if tokenizer.bytes_of(token_id) else SPECIAL for token_id in ids)
    return texts, "".join(TEXT if text else kind for text, kind in zip(texts, silent, strict=True))
