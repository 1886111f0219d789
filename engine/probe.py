"""A probe: the model repeats the prompt, and what it attends to meanwhile scores the entries (arXiv 2505.23416).

Whatever may be asked about a prompt later, an entry that is not even needed to write the prompt down again is not
needed. So, once a prefill is through, the model is asked to repeat the prompt, chunk by chunk, and is shown the words
that it should say: an instruction, then the chunk itself, whose positions follow the prompt's. These tokens attend to
all entries that the layers hold. An entry's score is the most that any of them attends to it, in any query head of its
group, where only the entries of its own chunk, the prompt's first ones and the probe's own compete for attention. What
the probe adds is written over by the next one, and no cache has seen it: logits, positions and entries are those of the
prefill itself.

What differs from the paper: chunks are of equal length, the longest that is wanted or for which positions are free.
The instruction is in words of our own, and plain: no chat template is put around it.

Cost: another pass over the prompt, each chunk of which attends to all of it, so that attention costs twice that of the
prefill; and in memory K and V of all tokens, and of the longest probe, in all layers (RequestPlan.held_nbytes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastkv.cache.policy import Probe
from fastkv.cache.scores import highest_attention
from fastkv.engine.attention import attend_last
from fastkv.engine.competing import HeldLayer
from fastkv.engine.projection import Projection
from fastkv.engine.workspace import Workspace
from fastkv.errors import FastKVError
from fastkv.models.llama import Llama

NAMED = 8  # tokens before a chunk, by which the instruction names it
_LEAST = 32  # tokens that a chunk has at the least: shorter ones would cost several times the prefill

Encode = Callable[[str], Sequence[int]]  # a text within a sequence -> its token ids


@dataclass(frozen=True)
class ProbePlan:
    """How a prompt of `n_tokens` is repeated: `chunk` tokens at a time at most, after the ids of an instruction.

    first: of the first chunk. later: of the others, followed by the tokens before the chunk.
    """

    n_tokens: int
    chunk: int
    sinks: int
    first: tuple[int, ...]
    later: tuple[int, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest probe."""
        return max(self._shown(begin) + end - begin for begin, end in self.chunks())

    def chunks(self) -> Iterator[tuple[int, int]]:
        """(begin, end) of each chunk, as even as can be."""
        count = -(-self.n_tokens // self.chunk)
        yield from ((self.n_tokens * at // count, self.n_tokens * (at + 1) // count) for at in range(count))

    def ids(self, prompt: Tensor, begin: int, end: int) -> Tensor:
        """The probe for a chunk of the prompt, int64 [B, n_tokens]: int64 [B, P]."""
        instruction = torch.tensor(self.later if begin else self.first, dtype=torch.int64, device=prompt.device)
        return torch.cat((instruction.expand(prompt.shape[0], -1), prompt[:, max(0, begin - NAMED) : end]), dim=1)

    def _shown(self, begin: int) -> int:
        """Tokens of the probe before the chunk itself."""
        return len(self.later) + min(begin, NAMED) if begin else len(self.first)


def plan_probe(probe: Probe, name: str, n_tokens: int, limit: int, encode: Encode) -> ProbePlan:
    """The plan for a prompt of `n_tokens` under the policy of this name, in a sequence of at most `limit` positions.

    Raises FastKVError where too few of these are free.
    """
    first, later = tuple(encode(probe.first)), tuple(encode(probe.later))
    around = max(len(first), len(later) + NAMED)
    needed = around + min(_LEAST, probe.chunk, n_tokens)
    if n_tokens + needed > limit:
        raise FastKVError(
            f"policy {name} lets the model repeat the prompt, which takes at least {needed} positions after its "
            f"{n_tokens} tokens, but the model has {limit} in all; take another policy, or shorten the prompt",
            setting="prompt",
        )
    chunk = min(probe.chunk, n_tokens, limit - n_tokens - around)
    return ProbePlan(n_tokens, chunk, probe.sinks, first, later)


def repeat_prompt(
    model: Llama,
    plan: ProbePlan,
    prompt: Tensor,
    projection: Projection,
    workspace: Workspace,
    layers: Sequence[HeldLayer],
) -> list[Tensor]:
    """The most that is attended to each token of the prompt, int64 [B, N]: of each layer float32 [B, Hkv, N].

    layers: all of them, with room for the longest probe.
    """
    highest: list[list[Tensor]] = [[] for _ in layers]
    for begin, end in plan.chunks():
        probe = plan.ids(prompt, begin, end)
        n_tokens, n_probed = prompt.shape[1], probe.shape[1]
        hidden = workspace.take("hidden", (*probe.shape, model.config.hidden_size), like=model)
        hidden, rope = model.embed(probe, out=hidden), model.rope_of_range(n_tokens, n_probed)
        for layer, held in enumerate(layers):
            q, k, v = projection.everything(layer, hidden, rope)
            sinks = min(plan.sinks, begin)
            competing = torch.cat((held.k[:, :, :sinks], held.k[:, :, begin:end], k), dim=2)
            highest[layer].append(highest_attention(q, competing, sinks, end - begin))
            if layer == len(layers) - 1:  # nobody reads its hidden states
                break
            whole = slice(n_tokens + n_probed)
            held.k[:, :, n_tokens : whole.stop], held.v[:, :, n_tokens : whole.stop] = k, v
            attended = attend_last(q, held.k[:, :, whole], held.v[:, :, whole], model.config.windows[layer])
            projection.finish_(layer, hidden, attended)
    return [torch.cat(of_layer, dim=2) for of_layer in highest]
