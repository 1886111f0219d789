"""The flags of speculation: what drafts the next tokens. Checked before torch is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastkv.console.words import counted
from fastkv.engine.speculation.figures import DRAFT_WEIGHTS, KINDS, Speculated, Speculation
from fastkv.errors import FastKVError, check_choice

SPECULATION_SETTINGS = ("lossless", "speculation", "draft_tokens", "draft_weights")


def add_speculation_flags(group: argparse._ArgumentGroup) -> None:
    """How tokens are drafted, to be judged several at a time."""
    group.add_argument(
        "--lossless", action="store_true", help="the answer of policy full; the policy only drafts (--speculation self)"
    )
    group.add_argument(
        "--speculation", metavar="|".join(KINDS), help="what drafts tokens: the model over what is kept, or the text"
    )
    group.add_argument(
        "--draft-tokens", type=int, metavar="N", help="1 to 16 drafted at a time (default: as many as pay)"
    )
    group.add_argument(
        "--draft-weights", metavar="|".join(DRAFT_WEIGHTS), help="with --lossless, a copy of the weights that drafts"
    )


def speculation_of(args: argparse.Namespace, of_document: bool) -> Speculation | None:
    """What the flags ask for. Raises FastKVError for flags that do not go together, and for a document or a list."""
    kind = args.speculation
    if args.lossless:
        if kind == "ngram":
            raise FastKVError("--lossless is --speculation self: leave it or --speculation ngram out")
        kind = "self"
    if args.draft_weights is not None:
        check_choice("draft_weights", args.draft_weights, DRAFT_WEIGHTS)
        if kind != "self":
            raise FastKVError("is for --lossless: add it, or leave this out", setting="draft_weights")
        if args.weights == args.draft_weights == "int8":
            raise FastKVError("--draft-weights and --weights are both int8: leave one of them out")
    if args.draft_tokens is not None and kind is None:
        raise FastKVError("is for --lossless or --speculation: add one, or leave this out", setting="draft_tokens")
    if kind is None:
        return None
    speculation = Speculation(kind, args.draft_tokens)
    flag = "--lossless" if args.lossless else "--speculation"
    others = {
        "--output, which is for several prompts": args.output is not None,
        "--context": of_document and args.context is not None,
        "--cache": of_document and args.cache is not None,
        "--decode-budget": args.decode_budget is not None,
        "--report": args.report is not None and kind == "self",
    }
    for other, given in others.items():
        if given:
            raise FastKVError(f"{flag} does not go with {other}: leave one of them out")
    return speculation


@contextmanager
def named_as_typed(args: argparse.Namespace) -> Iterator[None]:
    """Complaints about speculation are about --lossless, where that was typed."""
    try:
        yield
    except FastKVError as error:
        if not args.lossless or error.setting != "speculation":
            raise
        raise type(error)(str(error), setting="lossless", prompt=error.prompt) from None


def stream_arguments(speculation: Speculation | None) -> dict[str, Any]:
    """What LLM.stream is told."""
    if speculation is None:
        return {}
    return {"speculation": speculation.kind, "draft_tokens": speculation.draft_tokens}


def speculation_rows(told: Speculated | None) -> list[tuple[str, str]]:
    """What speculation has brought, as (label, text) rows."""
    if told is None:
        return []
    label = "lossless" if told.kind == "self" else "ngram"
    rate, each = told.acceptance, told.tokens_per_verification
    plain, drafted = counted(told.plain_steps, "plain step"), counted(told.drafted_tokens, "drafted token")
    if rate is None or each is None:
        text = f"nothing drafted, {plain}"
    else:
        text = (
            f"{told.accepted_tokens:,} of {drafted} accepted ({100 * rate:.0f} %), "
            f"{each:.1f} tokens a verification, {plain}"
        )
    if told.speed_up is not None:
        text += f", {told.speed_up:.2f} times as fast as plain steps"
    rows = [(label, text)]
    if told.draft_kv_bytes:
        weights = f", weights {told.draft_weight_bytes / 2**20:,.1f} MiB" if told.draft_weight_bytes else ""
        rows.append(("draft", f"KV {told.draft_kv_bytes / 2**20:,.1f} MiB on top of the full cache{weights}"))
    return rows
