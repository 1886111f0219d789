"""Needles of several lengths, and whether a policy still finds them. What counts is what the full cache finds.

An answer of few tokens is easy to keep, one of many breaks off: so the codes have 5 to 14 digits, or are a few words.
And the last tokens of a prompt, whose queries score all others, are at one time the beginning of an answer, at another
the end of a chat template (docs/accuracy.md): so every kind of code comes with both.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastkv.cache.policies import FullKV
from fastkv.cache.policy import Policy
from fastkv.engine.llm import LLM
from fastkv.engine.sampler import SamplingParams
from fastkv.eval.example import Draw, Example, Slot
from fastkv.eval.fitting import fit
from fastkv.eval.runner import Prompts
from fastkv.eval.tasks.archive_text import ADJECTIVES, NOUNS, record
from fastkv.eval.tasks.haystack import numbers
from fastkv.eval.tune.hay import hidden, pieces_of, small_talk, stretch

Kind = tuple[int, bool]  # digits of the code (0: words), and whether the beginning of the answer is given

KINDS: tuple[Kind, ...] = tuple((digits, lead) for digits in (5, 7, 9, 14, 0) for lead in (True, False))
EASIEST: tuple[Kind, ...] = ((4, True), (4, False))  # for a model that copies none of these
WORDS = 4
ROOM = 24  # tokens that may come before an answer whose beginning is not given
LONGEST = 64  # tokens of an answer, at most, with what may come before it
DEPTH_STEP = 0.618034  # of the golden ratio: any number of needles is spread evenly over the depths


@dataclass(frozen=True)
class Needle:
    """A prompt, and the tokens with which the full cache answers it right.

    ids: a ChatIds where the prompt is a whole conversation. begins: the first token of `answer` that is of the code.
    """

    kind: Kind
    ids: list[int]
    code: str
    answer: tuple[int, ...]
    begins: int


class Needles:
    """Draws needles for a model. texts: the user's own; none means small talk. length: tokens of a prompt, at most.

    Raises FastKVError for a model without a tokenizer.
    """

    def __init__(self, llm: LLM, texts: Sequence[str], length: int, seed: int) -> None:
        self._llm, self._length, self._seed = llm, length, seed
        self.chat = llm.tokenizer is not None and llm.tokenizer.has_chat
        self._prompts = Prompts(llm, self.chat)
        self._texts = [(pieces, self._share(pieces)) for pieces in map(pieces_of, texts)]

    def draw(self, kind: Kind, index: int) -> Needle | None:
        """The needle with this number, or None where the full cache does not find it. Runs the model."""
        example = self._example(kind, index)
        ids, code = self._prompts.ids(example), example.answers[0]
        room = min(len(self._prompts.bare(f" {code}")) + (4 if kind[1] else ROOM), LONGEST)
        text, tokens = "", list[int]()
        ends: list[int] = []  # of each token in the text
        stream = self._llm.stream(ids, SamplingParams(max_tokens=room), policy=FullKV())
        for piece in stream:
            text += piece.text
            tokens.append(piece.token_id)
            place = text.lower().find(code.lower())
            if place >= 0:
                stream.close()
                return Needle(kind, ids, code, tuple(tokens), sum(end <= place for end in ends))
            ends.append(len(text))
        return None

    def _example(self, kind: Kind, index: int) -> Example:
        depth = index * DEPTH_STEP % 1
        slot = Slot(f"tune, {kind[0]}", self._length, depth, index)
        draw = Draw(slot, self._seed, self._prompts.count, self._prompts.bare, self._prompts.decode)
        rng = draw.rng("lead" if kind[1] else "question")
        names, code = (rng.choice(ADJECTIVES), rng.choice(NOUNS)), _code(kind[0], rng)
        key, needle = " ".join(names), record(names, code)
        lead = f"\nAnswer: The access code of the {key} is"
        if not kind[1]:
            lead = "" if self.chat else "\nAnswer:"
        if self._texts:
            pieces, share = self._texts[index % len(self._texts)]
            pieces = stretch(pieces, share, rng)
        else:
            pieces = small_talk(rng, self._length)  # a sentence has more than one token

        def build(n: int) -> Example:
            return Example(
                f"{hidden(pieces[:n], needle, depth)}\n\nQuestion: What is the access code of the {key}?", (code,), lead
            )

        whole = build(len(pieces))
        return whole if self._prompts.count(whole) <= self._length else fit(draw, build, len(pieces))

    def _share(self, pieces: list[str]) -> float:
        """Of a text, what a prompt of the wanted length may take."""
        return min(1.0, self._length / max(1, len(self._prompts.bare("".join(pieces)))))


def _code(digits: int, rng: random.Random) -> str:
    if digits:
        return next(numbers(rng, digits))
    return " ".join(rng.choice(ADJECTIVES if place % 2 == 0 else NOUNS) for place in range(WORDS))


def finds(llm: LLM, needle: Needle, policy: Policy) -> bool:
    """Whether greedy decoding under this policy gives the code.

    One step of decoding takes the full cache's whole answer: where each next token is that answer's, greedy decoding
    gives the same. Where it departs before the code, the answer is decoded; within the code it is wrong.
    """
    answer = torch.tensor(needle.answer)
    covering = policy.covering(getattr(needle.ids, "tail", 0), len(needle.ids))
    prefill = llm.prefill(needle.ids, covering, max_tokens=len(answer))
    said = prefill.logits.argmax(dim=-1).cpu()
    if len(answer) > 1 and said[0] == answer[0]:
        logits = llm.decode(prefill.cache, answer[None, :-1])
        said = torch.cat([said, logits[0].argmax(dim=-1).cpu()])
    same = (said == answer[: len(said)]).tolist()
    departs = same.index(False) if False in same else len(answer)
    if departs == len(answer) or departs >= needle.begins:
        return departs == len(answer)
    params = SamplingParams(max_tokens=min(len(answer) + ROOM, LONGEST))
    return needle.code.lower() in llm.generate(needle.ids, params, policy=policy).text.lower()
