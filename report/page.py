"""Writes a Report as one HTML page that needs nothing else: no network, no other file.

The prompt and the answer are untrusted. They enter the page only as JSON in a block that no browser runs, with every
character escaped that could end the block or hide in it; the script puts them on the page as text, never as markup;
and a content security policy allows no script and no style but the page's own, and no request at all.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastkv.console.files import write_whole
from fastkv.report.data import Report

SCRIPTS = ("model.js", "text.js", "overview.js", "token.js", "page.js")  # one after another, in one scope

# Ends of the block, characters that an editor does not show, and halves of characters that UTF-8 cannot hold.
_HARMFUL = re.compile(r"[<>&\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")


def write_report(path: str | Path, report: Report) -> None:
    """Write the page of `report` to `path`, in UTF-8. Raises FastKVError where that cannot be."""
    write_whole(path, render(report), "report")


def render(report: Report) -> str:
    """The page as a string."""
    style = _part("page.css")
    script = "(() => {\n'use strict';\n" + "".join(map(_part, SCRIPTS)) + "})();\n"
    parts = {
        "title": html.escape(f"What {report.policy} kept of {len(report.ids):,} tokens"),
        "style": style,
        "style_hash": _hash(style),
        "script": script,
        "script_hash": _hash(script),
        "data": as_script_data(_payload(report)),
    }
    # In one pass: a prompt may spell out a marker too.
    return re.sub(r"@@(\w+)@@", lambda match: parts[match.group(1)], _part("page.html"))


def as_script_data(value: Any) -> str:
    """JSON that may stand inside a script element, and in which nothing is invisible."""
    return _HARMFUL.sub(lambda match: f"\\u{ord(match.group()):04x}", json.dumps(value, ensure_ascii=False))


def _payload(report: Report) -> dict[str, Any]:
    """What page.html's script reads. Masks are bits, eight tokens a byte, lowest first, each row padded to a byte."""
    n_layers, n_heads, _ = report.kept.shape
    return {
        "policy": report.policy,
        "layers": n_layers,
        "heads": n_heads,
        "texts": report.texts,
        "kinds": report.kinds,
        "ids": report.ids,
        "names": report.names,
        "reach": _bits(report.reach),
        "kept": _bits(report.kept),
        "answer": report.answer,
        "finish": report.finish_reason,
        "echoes": report.echoes,
        "figures": report.figures,
        "attention": report.attention,
    }


def _bits(mask: Tensor) -> str:
    """bool [..., N] -> base64 of its bits."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8))
    packed = (padded.unflatten(-1, (-1, 8)) << torch.arange(8, dtype=torch.uint8)).sum(-1)
    return base64.b64encode(bytes(packed.flatten().tolist())).decode("ascii")


def _part(name: str) -> str:
    return resources.files("fastkv.report").joinpath(name).read_text("utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
