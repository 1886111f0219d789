"""How much longer the steps of a tokenizer.json may make a text. One that answers a letter with a novel is refused."""

from __future__ import annotations

import base64
import math
import re
from typing import Any

MOST = 2000  # characters for each one that goes in; published tokenizers stay below 1400, all bounds multiplied

_REPEATED_GROUP = re.compile(r"\)[*+{]")  # an expression with one may go back and forth without end
# Kinds of steps that have not been seen to panic: others may.
_TAME = {
    *("Sequence", "Replace", "Split", "Prepend", "Strip", "Lowercase", "StripAccents", "NFC", "NFD", "NFKC", "NFKD"),
    *("ByteLevel", "Metaspace", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit", "BertPreTokenizer"),
    *("ByteFallback", "Fuse", "WordPiece", "BPEDecoder", "TemplateProcessing", "BertProcessing", "RobertaProcessing"),
}
_INSIDE = ("normalizers", "pretokenizers", "decoders", "processors")  # where a Sequence has its steps
PARTS = ("normalizer", "pre_tokenizer", "decoder", "post_processor")  # of a tokenizer.json, with steps that are run


def growth(tokenizer: dict[str, Any]) -> float:
    """A bound on the characters that come out of a tokenizer.json for each one that goes in, on the way to tokens or
    back from them. inf where that cannot be said.
    """
    steps_in = _growth(tokenizer.get("normalizer")) * _growth(tokenizer.get("pre_tokenizer"))
    return max(steps_in, _growth(tokenizer.get("decoder")))


def may_panic(step: Any) -> bool:
    """Whether a step is of a kind whose parameters can make the library panic at some text."""
    if not isinstance(step, dict):
        return False
    if step.get("type") not in _TAME or (step.get("type") == "Strip" and step.get("stop")):
        return True
    pattern = step.get("pattern")
    if isinstance(pattern, dict):
        expression = pattern.get("Regex")
        odd = pattern.get("String") == "" if expression is None else _REPEATED_GROUP.search(str(expression))
        if odd:
            return True
    return any(may_panic(each) for inside in _INSIDE for each in step.get(inside, ()))


def frame_length(step: Any) -> int:
    """How many tokens a post-processor may put around a text."""
    if not isinstance(step, dict):
        return 0
    inside = [each for steps in step.values() if isinstance(steps, list) for each in steps]
    if step.get("type") == "Sequence":
        return sum(map(frame_length, inside))
    tokens = step.get("special_tokens")
    sizes = {name: len(each.get("ids", ())) for name, each in tokens.items()} if isinstance(tokens, dict) else {}
    named = (each.get("SpecialToken", {}).get("id") for each in inside if isinstance(each, dict))
    return sum(sizes.get(name, 1) for name in named)


def _growth(step: Any) -> float:
    """Of one normalizer, pre-tokenizer or decoder; of those inside a Sequence one after another."""
    if not isinstance(step, dict):
        return 1.0
    kind = step.get("type")
    if kind == "Sequence":
        inside = (value for value in step.values() if isinstance(value, list))
        return math.prod(_growth(each) for steps in inside for each in steps)
    if kind == "Replace":
        return _of_replace(step)
    if kind == "Prepend":
        return 1.0 + _length(step.get("prepend"))  # a text has one character at the least
    if kind == "Precompiled":
        return _of_charsmap(step.get("precompiled_charsmap"))
    # Bytes as characters: two for one that is not ASCII. A space before each word. A space on both sides of a letter.
    return {"ByteLevel": 2.0, "Metaspace": 2.0, "BertNormalizer": 3.0, "NFKC": 18.0, "NFKD": 18.0}.get(str(kind), 1.0)


def _of_replace(step: dict[str, Any]) -> float:
    pattern, content = step.get("pattern"), _length(step.get("content"))
    if isinstance(pattern, dict) and isinstance(pattern.get("String"), str):
        return max(1.0, content / len(pattern["String"])) if pattern["String"] else 1.0 + content
    return 1.0 + content  # an expression may match nothing at all, before every character


def _of_charsmap(encoded: Any) -> float:
    """sentencepiece's table of characters: a trie, of whose size the first four bytes tell, and the texts to put."""
    try:
        table = base64.b64decode(encoded)
    except (TypeError, ValueError):
        return 1.0 if not encoded else math.inf
    texts = table[4 + int.from_bytes(table[:4], "little") :]
    return 1.0 + max(len(text.decode(errors="replace")) for text in texts.split(b"\0"))


def _length(text: Any) -> int:
    return len(text) if isinstance(text, str) else 1
