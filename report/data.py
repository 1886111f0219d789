"""What a report shows of one request, as plain data. Knows nothing of HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastkv.console.summary import figures
from fastkv.engine.llm import LLM
from fastkv.engine.output import Output
from fastkv.errors import FastKVError
from fastkv.report.echoes import echoes
from fastkv.report.texts import SPECIAL, token_texts


@dataclass(frozen=True)
class Report:
    """One prompt of N tokens, what each of L layers x H KV heads kept of it, and what came of it.

    texts, kinds, ids: for each token its text, its kind (texts.py) and its id. reach: bool [L, N], whether the layer
    saw the token. kept: bool [L, H, N]. names: of special tokens that have one, by id. echoes: token ranges
    [first, end) that repeat words of the answer. figures: (label, text) rows of budget and timing. attention: for each
    layer the share of the attention mass that it keeps, in [0, 1], None where it was not measured; () for none at all.
    """

    policy: str
    texts: list[str]
    kinds: str
    ids: list[int]
    names: dict[int, str]
    reach: Tensor
    kept: Tensor
    answer: str
    finish_reason: str
    echoes: list[tuple[int, int]]
    figures: list[tuple[str, str]]
    attention: tuple[float | None, ...] = ()


def report_of(
    llm: LLM, prompt_ids: Sequence[int], tokens: Sequence[Tensor], kept: Sequence[Tensor], output: Output
) -> Report:
    """The report of a finished request of `llm`, under the policy that it ran with.

    tokens: for each layer int64 [1, T], the original positions of what its keys saw; kept: for each layer int64
    [1, Hkv, n], the original positions in its cache, -1 being none (both as `LLM.prefill` returns them). Without a
    tokenizer the tokens have no texts. Raises FastKVError for a batch of more than one prompt.
    """
    if tokens[0].shape[0] != 1:
        raise FastKVError(f"a report shows one prompt, not a batch of {tokens[0].shape[0]}")
    ids = list(prompt_ids)
    texts, kinds = [""] * len(ids), SPECIAL * len(ids)
    if llm.tokenizer is not None:
        texts, kinds = token_texts(llm.tokenizer, ids)
    return Report(
        policy=output.run.policy,
        texts=texts,
        kinds=kinds,
        ids=ids,
        names=_names(llm),
        reach=torch.stack([_mask(positions[0], len(ids)) for positions in tokens]),
        kept=torch.stack([_mask(positions[0], len(ids)) for positions in kept]),
        answer=output.text,
        finish_reason=output.finish_reason,
        echoes=echoes(output.text, texts),
        figures=figures(output),
        attention=output.metrics.layer_attention,
    )


def _names(llm: LLM) -> dict[int, str]:
    if llm.tokenizer is None:
        return {}
    names = dict.fromkeys(llm.tokenizer.eos_ids, "EOS")
    if llm.tokenizer.bos_id is not None:
        names[llm.tokenizer.bos_id] = "BOS"
    return names


def _mask(positions: Tensor, length: int) -> Tensor:
    """Positions int64 [..., n] -> bool [..., length], on the CPU. -1 is no position."""
    positions = positions.cpu()
    there = torch.zeros(*positions.shape[:-1], length + 1, dtype=torch.bool)
    return there.scatter_(-1, positions % (length + 1), True)[..., :length]
