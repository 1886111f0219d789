"""The figures of docs/walkthrough.md, from the bundled model on a CPU in float32.

    python docs/walkthrough_figures.py request                  # one request, and a second question: calls and counts
    python docs/walkthrough_figures.py late --examples 100      # a question that is not in the prompt, or at its front
    python docs/walkthrough_figures.py several --examples 50    # eight questions about one text

Knows nothing of the page; tests/test_walkthrough.py holds the two together. Needs the `fastkv` package.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from fastkv import LLM, FastKV, FullKV
from fastkv.cache import scores
from fastkv.cache.dense import DenseLayer
from fastkv.cache.kv_cache import KVCache
from fastkv.cache.policy import Policy
from fastkv.cache.selection import select_entries
from fastkv.cli import read_prompt
from fastkv.engine import decode_attention, prefill
from fastkv.engine.sampler import Sampler
from fastkv.engine.step import Caches, EagerStepper
from fastkv.engine.tsp import TokenState
from fastkv.eval.statistics import mean_estimate, paired_estimate
from fastkv.eval.tasks.archive import compose, make_prompt
from fastkv.eval.tasks.archive_text import question
from fastkv.models.block import Block
from fastkv.models.llama import Llama

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "archive"
TOKENS = 1000  # of the texts that `late` and `several` ask about, about
SAID = [963, 20, 26, 22, 15]  # the answer to the bundled prompt and its full stop
NEXT = ("oaken", "ridge"), "2517"  # another record of the bundled prompt
ANSWER = 7  # tokens: a space with a digit, three digits, full stop, newline, end of text
SEVERAL, RECORDS = 8, 24  # questions about one text (as many as the model saw in training), of so many records

# min_tokens=8: else a text of 1,000 tokens would keep 128 of them, more than 10 %.
COMPARED: dict[str, Policy] = {
    "full": FullKV(),
    "FastKV, 10 %": FastKV.paper(min_tokens=8),
    "10 %, no TSP": FastKV.paper(min_tokens=8, tsp_rate=1.0),
    "FastKV, 50 %": FastKV.paper(min_tokens=8, kv_retention=0.5),
}
WATCHED: dict[Any, tuple[str, ...]] = {
    Llama: ("embed", "head"),
    Block: ("project", "project_kv", "project_q", "finish_"),
    KVCache: ("store",),
    DenseLayer: ("write",),
    TokenState: ("take",),
    Sampler: ("sample_slots",),
    scores: ("window_attention", "forward_pooled"),
    prefill: ("select_entries", "select_tokens", "causal_attention", "attend_parts"),
    decode_attention: ("attend_parts",),
}


class CallLog:
    """What the watched functions took and gave, in groups: what is before the layers, each layer, each step."""

    def __init__(self) -> None:
        self.groups: list[tuple[str, list[str]]] = [("before the layers", [])]

    def watch(self, owner: Any, name: str) -> Callable[..., Any]:
        """The function, and a line for each call of it."""
        real = getattr(owner, name)
        label = f"{owner.__name__}.{name}" if isinstance(owner, type) else name

        def called(*args: Any, **kwargs: Any) -> Any:
            result = real(*args, **kwargs)
            made = _shapes(kwargs.get("out") if result is None else result) or "in place"
            line = f"  {label:<20} {_shapes(args)} -> {made}"
            if line not in self.groups[-1][1]:  # a decode step does the same in every layer
                self.groups[-1][1].append(line)
            return result

        return called

    def text(self) -> str:
        """The groups in order, neighbours that are alike as one; of the decode steps the first."""
        blocks: list[str] = []
        for lines, alike in groupby([group for group in self.groups if group[1]], key=lambda group: group[1]):
            titles = [title for title, _ in alike]
            blocks += [titles[0] if len(titles) == 1 else f"{titles[0]} … {titles[-1]}", *lines]
            if titles[0] == "decode step":
                break
        return "\n".join(blocks)


@contextmanager
def watching() -> Iterator[CallLog]:
    """Log the calls of the watched functions while the block runs."""
    log = CallLog()
    layer, step = prefill.LayerRun.layer, EagerStepper.step

    def next_layer(run: prefill.LayerRun, index: int, *rest: Any) -> Any:
        log.groups.append((f"layer {index}", []))
        result = layer(run, index, *rest)
        log.groups.append(("after the layers", []))
        return result

    def next_step(stepper: EagerStepper, caches: Caches) -> None:
        log.groups.append(("decode step", []))
        step(stepper, caches)

    with ExitStack() as stack:
        for owner, names in WATCHED.items():
            for name in names:
                stack.enter_context(patch.object(owner, name, log.watch(owner, name)))
        stack.enter_context(patch.object(prefill.LayerRun, "layer", next_layer))
        stack.enter_context(patch.object(EagerStepper, "step", next_step))
        yield log


def _shapes(value: Any) -> str:
    """Of a tensor, of the hidden states of a TokenState, of each that is in a tuple or list; nothing of all else."""
    if isinstance(value, (tuple, list)):
        return ", ".join(filter(None, map(_shapes, value)))
    tensor = value.hidden if isinstance(value, TokenState) else value
    return str(list(tensor.shape)) if isinstance(tensor, Tensor) else ""


def request_figures(llm: LLM) -> dict[str, Any]:
    """What happens to the bundled prompt under FastKV(): calls, sizes, ties, the record asked for, the answer."""
    text, code = read_prompt(str(EXAMPLE / "prompt.txt")), (EXAMPLE / "answer.txt").read_text().strip()
    with watching() as log:
        output = llm.generate(text)
    scored: list[tuple[Tensor, int]] = []

    def noted(scores: Tensor, count: int, window: int) -> Tensor:
        scored.extend((head, count - window) for head in scores[0])
        return select_entries(scores, count, window)

    with patch.object(prefill, "select_entries", noted):
        pre = llm.prefill(ids_of(llm, text))
    end = len(ids_of(llm, text[: text.index(f" {code}.") + len(f" {code}")]))
    digits = set(range(end - len(code), end))
    kept = [[set(head.tolist()) for head in layer[0]] for layer in pre.kept]
    return {
        "calls": log.text(),
        "characters": len(text),
        "capacity": pre.cache.pool.capacities[0],
        "metrics": output.metrics,
        "answer": output.token_ids,
        "digits": sorted(digits),
        "digits propagated": len(digits & set(pre.tokens[-1][0].tolist())),
        "digits kept": [[len(digits & head) for head in layer] for layer in kept],
        "kept by both heads": [len(first & second) for first, second in kept],
        "different scores": len(set(scored[0][0].tolist())),
        "ties at the border": sum(int((s == s.topk(n).values[-1]).sum()) > 1 for s, n in scored),
    }


def continued_figures(llm: LLM, policy: Policy | None = None) -> dict[str, Any]:
    """After the bundled prompt and its answer: several tokens in a step, back, and another question to the cache."""
    text, answer = read_prompt(str(EXAMPLE / "prompt.txt")), torch.tensor([SAID])
    cache = llm.prefill(ids_of(llm, text), policy).cache
    found: dict[str, Any] = {"logits of a step": list(llm.decode(cache, answer).shape)}
    found["after a step"] = cache.count(0), cache.position
    cache.truncate(answer.shape[1])
    found["after truncate"] = cache.count(0), cache.position
    llm.decode(cache, answer)
    names, code = NEXT
    new = without_bos(llm, f"\n{question(names)}")
    with watching() as log:
        pre = llm.prefill(new, policy, max_tokens=20, cache=cache)
    found |= {
        "new tokens": len(new),
        "calls of the second prefill": log.text(),
        "propagated": pre.layer_tokens[-1],
        "after the second prefill": (cache.count(0), cache.position, cache.whole_from),
        "second answer right": ask(llm, cache, [], code, pre.logits)[0] > 0,
    }
    return found


def ids_of(llm: LLM, text: str) -> list[int]:
    assert llm.tokenizer is not None
    return llm.tokenizer.encode(text)


def without_bos(llm: LLM, text: str) -> list[int]:
    """The ids of a text that follows on another one."""
    return ids_of(llm, text)[1:]


def ask(llm: LLM, cache: KVCache, ids: Sequence[int], code: str, logits: Tensor | None = None) -> tuple[float, int]:
    """Feed `ids` token by token and answer greedily: whether that is the code, and the last token, not yet fed."""
    for token in ids:
        logits = llm.decode(cache, torch.tensor([token]))
    answer: list[int] = []
    while logits is not None:
        answer.append(int(logits.argmax()))
        done = len(answer) == ANSWER or answer[-1] in llm.config.eos_token_ids
        logits = None if done else llm.decode(cache, torch.tensor(answer[-1:]))
    return float(answer[: len(code)] == without_bos(llm, f" {code}")), answer[-1]


def late_questions(llm: LLM, seed: int, policy: Policy) -> dict[str, float]:
    """One text, one question: last in the prompt, fed after the prefill alone, and at the front of the prompt too."""
    prompt = make_prompt(partial(without_bos, llm), TOKENS, depth=(seed % 5) / 4, seed=seed)
    text, asked = prompt.text.rsplit("\n", 1)
    later = without_bos(llm, "\n" + asked)
    cases: dict[str, tuple[str, list[int]]] = {
        "last in the prompt": (prompt.text, []),
        "fed after the prefill": (text, later),
        "first in the prompt and nowhere else": (f"{asked}\n{text}\nAnswer:", []),
        "first in the prompt, fed again after the prefill": (f"{asked}\n{text}", later),
    }
    scores: dict[str, float] = {}
    for case, (read, fed) in cases.items():
        pre = llm.prefill(ids_of(llm, read), policy, max_tokens=64)
        scores[case], _ = ask(llm, pre.cache, fed, prompt.answers[0], pre.logits)
    return scores


def several_questions(llm: LLM, seed: int, policy: Policy) -> dict[str, float]:
    """Eight records of one text: their names listed at the end of the prompt, then asked for one by one."""
    rng, encode = random.Random(seed), partial(without_bos, llm)
    archive = compose(rng, encode, TOKENS - 100, RECORDS)  # the list takes about 100 tokens
    keys = rng.sample(archive.askable, SEVERAL)
    names = " ".join(f"The access code of the {first} {second}." for first, second in keys)
    cache = llm.prefill(ids_of(llm, f"{archive.text}\nQuestion: {names}"), policy, max_tokens=512).cache
    right, before = 0.0, encode("\n")
    for key in keys:
        score, last = ask(llm, cache, [*before, *encode(question(key))], archive.codes[key])
        right, before = right + score, [last]
    return {"eight, listed last in the prompt, then fed one by one": right / SEVERAL}


def measure(llm: LLM, scores_of: Callable[[LLM, int, Policy], dict[str, float]], examples: int) -> str:
    """A Markdown table: right codes in % with 95 % intervals, and differences to the full cache text by text."""
    found: dict[str, dict[str, list[float]]] = {}
    for seed in range(examples):
        for name, policy in COMPARED.items():
            for case, score in scores_of(llm, seed, policy).items():
                found.setdefault(case, {}).setdefault(name, []).append(score)
    rows = [["the question", *COMPARED], ["---"] * (1 + len(COMPARED))]
    rows += [[case, *(_cell(each[name], each["full"]) for name in COMPARED)] for case, each in found.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cell(scores: list[float], full: list[float]) -> str:
    own, off = mean_estimate(scores), paired_estimate(scores, full)
    cell = f"{100 * own.mean:.0f} ({100 * own.low:.0f} – {100 * own.high:.0f})"
    difference = f"{100 * off.mean:+.0f} ({100 * off.low:+.0f} to {100 * off.high:+.0f})".replace("-", "−")
    return cell if scores is full else f"{cell}; {difference}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Figures of docs/walkthrough.md.", usage=argparse.SUPPRESS)
    parser.add_argument("what", choices=("request", "late", "several"))
    parser.add_argument("--examples", type=int, default=50, metavar="N", help="texts to ask about (50)")
    args = parser.parse_args(arguments)
    if args.examples < 1:
        parser.error(f"--examples must be at least 1, not {args.examples}")
    torch.set_num_threads(1)
    llm = LLM(EXAMPLE / "model", dtype="float32", device="cpu")
    if args.what == "request":
        found = {**request_figures(llm), **continued_figures(llm)}
        print("\n".join(f"{name}: {value}" for name, value in found.items()))
    else:
        print(measure(llm, late_questions if args.what == "late" else several_questions, args.examples))
    return 0


if __name__ == "__main__":
    sys.exit(main())
