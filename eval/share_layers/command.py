"""fastkv-eval share-layers: the map of layers that read an earlier layer's entries in place of their own.

It compares what the layers of a model store on some texts (similarity.py), tries pairs from the most distant on
(search.py), prints those that stay and writes them as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial

import torch

from fastkv.cache.layer_map import KIND
from fastkv.console.files import write_whole
from fastkv.console.machine import fingerprint, machine
from fastkv.console.markdown import markdown
from fastkv.console.parser import DONE
from fastkv.console.progress import ProgressLine
from fastkv.console.prompt import read_prompt
from fastkv.console.words import counted
from fastkv.engine.llm import LLM
from fastkv.engine.shared_layers import turn_alike
from fastkv.errors import FastKVError, check_integer, writable
from fastkv.eval.head_scores.command import model_name
from fastkv.eval.run import load
from fastkv.eval.share_layers.search import Tried, search
from fastkv.eval.share_layers.similarity import MeanEntries, batches, mean_cosine
from fastkv.eval.share_layers.texts import texts_of

EXAMPLES, LENGTH, THRESHOLD = 30, 64, 0.5  # the paper's
LONGEST = 1024  # tokens of a text: the means of all layers take as much memory as its K and V in float64


def run(args: argparse.Namespace) -> int:
    """Run the command; its exit status. Raises FastKVError for a user's mistake."""
    text = None if args.text is None else read_prompt(args.text, "--text")
    llm, folder = load(args)
    n_layers, length = llm.config.n_layers, args.length or LENGTH
    check_integer("layers", args.layers, 1, n_layers - 1)
    check_integer("length", length, 1, min(LONGEST, llm.config.context_length))
    if llm.tokenizer is None:
        raise FastKVError(f"{folder}: has no tokenizer, so texts cannot be read", setting="model")
    texts, goes_on = texts_of(llm.tokenizer, text, args.examples or EXAMPLES, length, args.seed or 0)
    threshold = THRESHOLD if args.threshold is None else args.threshold
    with ProgressLine(None if args.quiet else sys.stderr) as progress:
        tried = _tried(llm, texts, args.layers, threshold, progress)
    pairs = [each for each in tried if each.stays]
    if not pairs:
        raise FastKVError(
            f"none of {counted(len(tried), 'pair')} keeps the cosine above {threshold:g}; lower it (nothing was "
            "written)",
            setting="threshold",
        )
    # Nothing in it changes from one run of the same command on the same machine to the next.
    content = {
        "kind": KIND,
        "model": model_name(args.model),
        "files": fingerprint(folder),
        "n_layers": n_layers,
        "wanted": args.layers,
        "threshold": threshold,
        "text": None if args.text is None else writable(args.text),
        "texts": len(texts),
        "tokens": sum(map(len, texts)),
        "seed": args.seed or 0,
        "tried": len(tried),
        "kv_saved": len(pairs) / n_layers,
        **machine(llm),
        "pairs": [
            {"reader": each.reader, "source": each.source, "distance": each.distance, "cosine": each.cosine}
            for each in pairs
        ],
    }
    write_whole(args.output, json.dumps(content) + "\n", "output")
    print(table(pairs, n_layers), end="")
    was = "was" if len(tried) == 1 else "were"
    print(f"{counted(len(tried), 'pair')} {was} tried, on {_told(texts, args.text, goes_on)}.")
    if len(pairs) < args.layers:
        print(f"{args.layers} layers were wanted, but no other pair keeps the cosine above {threshold:g}.")
    return DONE


def _tried(llm: LLM, texts: list[list[int]], wanted: int, threshold: float, progress: ProgressLine) -> list[Tried]:
    """The pairs that were tried, in order."""
    model, means = llm.model, MeanEntries(llm.config.n_layers, max(map(len, texts)))
    known: list[tuple[torch.Tensor, torch.Tensor]] = []
    together = batches(texts, llm.device)
    for done, ids in enumerate(together):
        progress.show("reading the texts", done, len(together))
        known.append((ids, means.add(model, ids)))
    tried: list[Tried] = []
    cosine = partial(mean_cosine, model, known)
    for each in search(means.distances().tolist(), wanted, threshold, cosine, partial(turn_alike, model)):
        tried.append(each)
        found = sum(one.stays for one in tried)
        progress.show(
            f"{counted(len(tried), 'pair')} tried, {found} of {counted(wanted, 'layer')} found", found, wanted
        )
    return tried


def table(pairs: Sequence[Tried], n_layers: int) -> str:
    """The pairs that stay, in the order in which they were found."""
    rows = [
        [
            str(each.reader),
            str(each.source),
            f"{each.distance:.4g}",
            f"{each.cosine:.3f}",
            f"{100 * count / n_layers:.1f} %",
        ]
        for count, each in enumerate(pairs, start=1)
    ]
    return (
        f"{markdown(['layer', 'reads layer', 'distance', 'cosine', 'KV saved'], rows)}\n"
        "distance: of what the two layers store, Euclidean, of the means over the texts. cosine: between the model's\n"
        "final hidden states as it is, and with this pair and those above it: the mean over all tokens.\n"
    )


def _told(texts: list[list[int]], name: str | None, goes_on: bool) -> str:
    """What was read, in words."""
    longest = max(map(len, texts))
    shorter = sum(len(text) < longest for text in texts)
    lengths = f"{counted(len(texts), 'text')} of {counted(longest, 'token')}" + (
        f" ({shorter} of them shorter)" if shorter else ""
    )
    if name is None:
        return f"{lengths} of generated small talk"
    return f"{lengths} out of {writable(name)}" + (", which goes on after them" if goes_on else "")
