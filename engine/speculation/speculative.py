"""One sequence whose tokens come in rounds: some are drafted, then the model judges all of them in one step.

The model's own choice at every place is what the answer gets, chosen by the same sampler, with the same random numbers,
as a plain step chooses there. A drafted token stays where it is that choice; the first one that is not, and all after
it, are forgotten. So the text is that of plain steps, greedy or drawn, with any settings, whatever was drafted: a poor
draft costs time only. (The usual rule, min(1, p / q) of arXiv 2211.17192, has the same distribution, and accepts at
least as many drawn tokens; but by other random numbers: the text of a seed would depend on how many are drafted.)
Sums of several tokens at once are rounded otherwise than those of one, which decides near ties only. With a kv_dtype
entries are packed as soon as any judged token asks for it, which may be a few steps sooner than in plain steps.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace

import torch
from torch import Tensor

from fastkv.cache.kv_cache import KVCache
from fastkv.engine.decode import decode_step
from fastkv.engine.decode_batch import DecodeBatch
from fastkv.engine.plan import RequestPlan
from fastkv.engine.prefill import Prefill, prefill
from fastkv.engine.request import Request
from fastkv.engine.runtime import Runtime
from fastkv.engine.sampler import NOT_FINITE, not_finite_error
from fastkv.engine.speculation.drafts import Draft, Entries, SelfDraft, TextDraft
from fastkv.engine.speculation.figures import MOST_DRAFTED, Speculated
from fastkv.engine.speculation.pace import Pace
from fastkv.kernels.threads import as_many
from fastkv.models.llama import JUDGED
from fastkv.models.weights import bytes_apart

_AT_A_TIME = 1024  # tokens of a prompt that are Python's numbers at a time: each takes as much as a dozen characters
_ENOUGH = 4  # verifications: with fewer, what comes once (kernels are chosen) would be taken for what drafts cost


class SpeculativeBatch(DecodeBatch):
    """A DecodeBatch of one request that speculates. drafting: what drafts run on; None: the text itself drafts."""

    def __init__(self, runtime: Runtime, request: Request, drafting: Runtime | None) -> None:
        super().__init__(runtime, [request])
        assert request.speculation is not None, "a request that speculates"
        self._kind, self._drafting = request.speculation.kind, drafting
        self._request = request
        row, plan = runtime.model.row, request.plan
        plain = not plan.layout.per_head and plan.layout.kv_dtype is None and not any(runtime.model.config.windows)
        self._compiled = row is not None and plain and plan.max_tokens > JUDGED
        # A longer round would be compiled anew for each number of tokens, in the middle of the answer.
        most = JUDGED - 1 if self._compiled else MOST_DRAFTED if drafting is None else MOST_DRAFTED // 2
        self._pace = Pace(request.speculation.draft_tokens, most)
        if row is not None and self._compiled:
            with as_many(runtime.step_threads):
                row.prepare(JUDGED)
        self._known_draft: Draft | None = None
        self._ready: deque[int] = deque()  # tokens that nobody has read yet
        self._counts = {"verifications": 0, "plain_steps": 0, "drafted_tokens": 0, "accepted_tokens": 0}
        self._seconds = self._drafting_seconds = self._verifying_seconds = 0.0

    def launch_as_needed(self) -> None:
        """See DecodeBatch; nothing runs ahead here."""
        if not self._ready and not self._unread:
            self._round()

    def read(self) -> list[tuple[int, int]]:
        """See DecodeBatch: one token of the request at a time."""
        if self._unread:
            found = super().read()
            self._draft.add([token for _, token in found], None)
            return found
        token = self._ready.popleft()
        if token == NOT_FINITE:
            raise not_finite_error(self._runtime.model.dtype)
        return [(slot, token) for slot in self._at_work]

    def figures(self) -> Speculated:
        """What speculation has brought so far."""
        step, counts = self._pace.plain_step, self._counts
        brought = counts["verifications"] + counts["plain_steps"] + counts["accepted_tokens"]
        drafting = self._drafting
        plan = self._request.draft_plan
        return Speculated(
            self._kind,
            **counts,
            speed_up=brought * step / self._seconds if step and counts["verifications"] >= _ENOUGH else None,
            draft_kv_bytes=0 if plan is None else plan.nbytes + plan.index_nbytes,
            draft_weight_bytes=0 if drafting is None else bytes_apart(drafting.model, self._runtime.model),
            draft_seconds=self._drafting_seconds,
            verify_seconds=self._verifying_seconds,
            plain_seconds=step,
        )

    def close(self) -> None:
        """See DecodeBatch."""
        draft, self._known_draft = self._known_draft, None
        if draft is not None:
            draft.close()
        super().close()

    def _prefill(self, request: Request, ids: Tensor, plan: RequestPlan, cache: KVCache) -> Prefill:
        draft_plan = request.draft_plan
        if draft_plan is None or self._drafting is None:
            return super()._prefill(request, ids, plan, cache)
        model, attention = self._runtime.model, self._runtime.attention
        self._known_draft = draft = SelfDraft(self._drafting, draft_plan, cache, self._state.sampler)
        ids, workspace = ids.to(model.device), self._buffers.workspace
        result = prefill(model, ids, draft_plan, draft.cache, workspace, attention, request.eos_ids, cache)
        draft.start(request.params, ids)
        return replace(result, cache=cache, mass=[None] * len(result.mass))  # what answers holds everything

    @property
    def _draft(self) -> Draft:
        """Who drafts; the text, unless a prefill has filled a draft's cache."""
        if self._known_draft is None:
            self._known_draft = TextDraft([])
            for part in self._request.all_ids[0].split(_AT_A_TIME):
                self._known_draft.add(part.tolist(), None)
        return self._known_draft

    def _round(self) -> None:
        """The next token, or several."""
        ((slot, sequence),) = self._at_work.items()
        left = self._request.max_tokens - sequence.launched
        if left < 1:
            return
        began = time.perf_counter()
        drafted = self._draft.propose(min(self._pace.next(), left - 1 if self._can_judge(sequence.cache) else 0))
        ready = time.perf_counter()
        entries: Entries | None = None
        if drafted:
            tokens, entries = self._judged(slot, sequence.cache, drafted)
        else:
            self._step({slot: sequence.cache})
            tokens = self._state.tokens[slot : slot + 1].tolist()
        done = time.perf_counter()
        self._draft.add(tokens, entries)
        # What `add` takes is the draft's, too.
        self._count(len(drafted), len(tokens) - 1, ready - began + time.perf_counter() - done, done - ready)
        sequence.launched += len(tokens)
        self._ready += tokens

    def _count(self, drafted: int, accepted: int, drafting: float, step: float) -> None:
        """A round is done; drafting, step: seconds of the draft and of the model's step."""
        self._seconds += drafting + step
        if not drafted:
            self._counts["plain_steps"] += 1
            self._pace.stepped(step)
            return
        self._drafting_seconds += drafting
        self._verifying_seconds += step
        self._pace.judged(drafted, accepted, drafting, step)
        for name, count in (("verifications", 1), ("drafted_tokens", drafted), ("accepted_tokens", accepted)):
            self._counts[name] += count

    @torch.inference_mode()
    def _judged(self, slot: int, cache: KVCache, drafted: list[int]) -> tuple[list[int], Entries]:
        """The tokens that the model chooses after the last one, as far as the drafted ones are right, and one more.

        And K and V of what came before each. The cache then holds what plain steps would have left.
        """
        state, model, entries = self._state, self._runtime.model, Entries()
        slots = torch.full((1,), slot, device=state.tokens.device)
        more = self._more(1 + len(drafted))
        after = torch.tensor([[*drafted, *[0] * more]], device=slots.device)
        ids = torch.cat((state.tokens[slots].unsqueeze(0), after), dim=1)
        with as_many(self._runtime.step_threads):
            logits = decode_step(model, cache, ids, entries)
        tokens: list[int] = []
        for place, guess in enumerate([*drafted, None]):
            chosen = state.sampler.sample_slots(logits[:, place], slots)
            tokens.append(int(chosen))
            if tokens[-1] != guess:
                break
        state.tokens[slots] = chosen
        cache.truncate(1 + len(drafted) + more - len(tokens))
        return tokens, entries

    def _can_judge(self, cache: KVCache) -> bool:
        """Whether there is room for a step that judges: a compiled one of fewer tokens would be compiled anew."""
        return not self._compiled or min(cache.room, cache.position_limit - cache.position) >= JUDGED

    def _more(self, count: int) -> int:
        """Tokens that are judged besides and forgotten: a compiled step judges JUDGED of them, whatever was drafted."""
        return max(0, JUDGED - count) if self._compiled else 0
