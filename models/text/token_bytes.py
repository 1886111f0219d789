"""The bytes that a token stands for, where it may stand for a part of a character. b"" for whole characters."""

from __future__ import annotations

import re
from functools import cache

_ONE_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def bytes_of_text(text: str) -> bytes:
    """Of a token of a byte-level tokenizer, which writes each byte as one character of its own."""
    table = byte_of_character()
    if not all(character in table for character in text):
        return b""
    return bytes(table[character] for character in text)


def bytes_of_fallback(text: str) -> bytes:
    """Of a token such as `<0xE6>`, one byte of what has no token."""
    match = _ONE_BYTE.fullmatch(text)
    return bytes([int(match[1], 16)]) if match else b""


@cache
def byte_of_character() -> dict[str, int]:
    """The characters that byte-level tokenizers write bytes as: printable Latin-1 as it is, the others from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + place): byte for place, byte in enumerate(others)})
    return table
