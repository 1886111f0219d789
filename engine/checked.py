"""From what a user gives to a request that is checked: prompts, policies and what is drafted. Runs nothing."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkv.cache.decode_budget import DecodeBudget
from fastkv.cache.policies import FullKV
from fastkv.cache.policy import Policy
from fastkv.cache.pool import bytes_of
from fastkv.engine.decode_batch import capacities_of, layout_of
from fastkv.engine.footprint import Footprint, footprint
from fastkv.engine.loaded import LoadedModel
from fastkv.engine.memory import explain_out_of_memory
from fastkv.engine.offloading.plan import planned_for_memory
from fastkv.engine.plan import RequestPlan, plan_request, position_limit
from fastkv.engine.request import (
    Request,
    Sizes,
    answer_length,
    check_request_fits,
    id_tensor,
)
from fastkv.engine.sampler import SamplingParams
from fastkv.engine.speculation.asking import drafted_by_model, drafted_from_text
from fastkv.engine.speculation.figures import Speculation
from fastkv.engine.turn import Turn
from fastkv.errors import FastKVError
from fastkv.kernels.out_of_memory import REQUEST
from fastkv.models.text.tokenizer import Tokenizer


class CheckedRequests(LoadedModel):
    """Makes the requests of LLM. Each method raises FastKVError for a mistake, and for too little memory."""

    @explain_out_of_memory(REQUEST)
    def _request(
        self,
        prompt: str | list[int] | Turn,
        params: SamplingParams | None,
        policy: Policy | None,
        fitting: set[Sizes] | None = None,
        decode_budget: DecodeBudget | None = None,
    ) -> Request:
        """A checked request. fitting: sizes of requests of the same list for which memory is known to suffice."""
        if os.getpid() != self._process:
            self._check_process()
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise FastKVError(f"params must be SamplingParams, not {type(params).__name__}")
        turn = prompt if isinstance(prompt, Turn) else None
        if turn is not None and turn.owner.model is not self._model:
            raise FastKVError(
                "this turn is of a session of another LLM, whose entries mean nothing here: give it to that one; "
                "Session.save and load_session take a session to another LLM of the same model",
                setting="prompt",
            )
        if self.ranks is not None and params.temperature > 0 and params.seed is None:
            params = dataclasses.replace(params, seed=self.ranks.seed(self._device))  # all draw the same
        ids = self._turn_ids(prompt) if isinstance(prompt, Turn) else self._token_ids(prompt)
        policy = turn.working_policy if turn is not None else policy
        policy = self.policy if policy is None else self._checked_policy(policy)
        policy = policy.covering(getattr(prompt, "tail", 0), ids.shape[1])
        past, evicts = None if turn is None else turn.held.snapshot, decode_budget is not None
        if turn is not None and self._sources:
            self._refuse_shared("sessions")
        if turn is not None and evicts:
            raise FastKVError(
                "a session keeps what comes later whole: leave decode_budget out", setting="decode_budget"
            )
        n_before = 0 if past is None else past.position
        limit = position_limit(self.config, policy, ids.shape[1], past, evicts)
        max_tokens = answer_length(self.config, params, ids.shape[1], limit, n_before, evicts)
        sizes = ids.shape[1], max_tokens, self.dtype, limit
        ways: dict[str, Any] = {"kv_dtype": self.kv_dtype, "shared": self._sources}
        plan = self._agreed(plan_request(self._model.config, policy, *sizes, past, self._told, decode_budget, **ways))
        request = Request(ids, params, plan, self._eos_ids(params, getattr(prompt, "ends", frozenset())), turn)
        if fitting is None or self.offload or request.sizes not in fitting:
            slot, draws = self._slot_bytes(request), params.temperature > 0
            kept = plan.nbytes if turn is not None and turn.keep else 0  # what the session then holds, beside the slot
            plan = self._fitting(plan, lambda way: footprint(self._model, way, slot + kept, draws=draws))
            request = dataclasses.replace(request, plan=plan)
        if fitting is not None:
            fitting.add(request.sizes)
        return request

    def _agreed(self, plan: RequestPlan) -> RequestPlan:
        """The plan with memory that is the same on all ranks, whose heads may hold different numbers of entries.

        Raises FastKVError for what such heads do not do alike.
        """
        if self.ranks is None or not plan.layout.per_head:
            return plan
        if plan.evicts is not None:
            self._refuse_ranks("decode_budget with heads that hold different numbers of entries", "decode_budget")
        return dataclasses.replace(plan, capacities=tuple(self.ranks.largest(plan.capacities, self._device)))

    def _slot_bytes(self, request: Request) -> int:
        """Bytes of the slot that a request is given if it is alone."""
        return bytes_of(layout_of([request]), capacities_of([request]), request.plan.shape)

    def _fitting(self, plan: RequestPlan, needs: Callable[[RequestPlan], Footprint], pool: bool = True) -> RequestPlan:
        """The plan, by host memory if it fits in no other way. FastKVError where memory is too little.

        pool: whether the slots of earlier requests can be used again.
        """

        def check(plan: RequestPlan) -> None:
            needed, buffers = needs(plan), self._runtime.buffers
            reusable = buffers.reusable(needed.cache if pool else 0, needed.workspace)
            check_request_fits(self._model, plan, needed, reusable, buffers.reusable(0, needed.host))

        return planned_for_memory(plan, self.offload, check)

    def _request_of(
        self,
        index: int,
        prompt: Any,
        params: Any,
        policy: Policy,
        fitting: set[Sizes],
        decode_budget: DecodeBudget | None,
    ) -> Request:
        """A request of a list: what is wrong with it is told with its place there."""
        try:
            return self._request(prompt, params, policy, fitting, decode_budget)
        except FastKVError as error:
            message = f"prompt {index} of the list: {error}"
            raise FastKVError(message, setting=error.setting, prompt=index) from error

    def _token_ids(self, prompt: str | Sequence[int] | Tensor) -> Tensor:
        """int64 [1, N], on the host."""
        if isinstance(prompt, str):
            encoded = self._required_tokenizer().encode(prompt, self.config.context_length) if prompt else []
            return torch.tensor([self._checked_encoding(encoded)])
        ids = id_tensor(prompt, self.config.vocab_size)
        if ids.shape[0] != 1:
            raise FastKVError("generate and stream take a list of prompts, not a tensor of several; prefill does")
        # The caller may write to a tensor of his own later, and a stream reads its prompt later; prefix_cache for good.
        return ids.cpu().clone()

    def _turn_ids(self, turn: Turn) -> Tensor:
        """int64 [1, N], on the host: what a turn's session has not read yet, and the prompt."""
        prompt, waiting = turn.prompt, turn.held.waiting
        if isinstance(prompt, str) and prompt and turn.held.ids:
            encoded = self._required_tokenizer().encode(prompt, self.config.context_length, begins=False)
            ids = torch.tensor([self._checked_encoding(encoded)])
        else:
            ids = self._token_ids(prompt)
        return torch.cat((torch.tensor([waiting], dtype=torch.int64), ids), dim=1) if waiting else ids

    def _speculating(
        self,
        prompt: Any,
        params: SamplingParams | None,
        policy: Policy | None,
        speculation: Speculation,
        budget: DecodeBudget | None,
        keep_selection: bool,
    ) -> Request:
        """A checked request whose tokens are drafted."""
        for refused, what in (
            (isinstance(prompt, Turn), "the turn of a session"),
            (budget is not None, "decode_budget"),
            (keep_selection and speculation.kind == "self", "keep_selection, which would show what drafts see"),
        ):
            if refused:
                raise FastKVError(f"speculation does not go with {what}: leave it out", setting="speculation")
        if self._sources:
            self._refuse_shared("speculation")
        by_model = speculation.kind == "self"
        drafts = self.policy if policy is None else self._checked_policy(policy)
        request = self._request(prompt, params, FullKV() if by_model else policy)
        if request.plan.offload is not None:
            raise FastKVError(
                "this prompt fits by offload only, which speculation does not go with: leave one of the two out",
                setting="speculation",
            )
        if by_model:
            room = position_limit(self.config, drafts, request.plan.n_tokens) - request.plan.n_tokens
            if 0 < room < request.max_tokens and request.params.max_tokens is None:  # nobody asked for so many
                request = self._request(prompt, dataclasses.replace(request.params, max_tokens=room), FullKV())
            drafts = drafts.covering(getattr(prompt, "tail", 0), request.plan.n_tokens)
            return drafted_by_model(self._runtime, self._drafting, request, drafts, speculation, self._told)
        return drafted_from_text(self._runtime, request, speculation)

    def _required_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise FastKVError(f"{self._folder}: no tokenizer.json and no tokenizer.model, so text cannot be read")
        return self.tokenizer

    def _told(self, text: str) -> list[int]:
        """Token ids of what a policy tells the model; none where it has no tokenizer."""
        if self.tokenizer is None or not text:
            return []
        return self._checked_encoding(self.tokenizer.encode(text, begins=False))

    def _checked_encoding(self, ids: list[int]) -> list[int]:
        """What the tokenizer made of a text: not empty, and known to the model."""
        if not ids:
            raise FastKVError("the prompt is empty", setting="prompt")
        if max(ids) >= self.config.vocab_size:
            raise FastKVError(
                f"{self._folder}: the tokenizer gives token id {max(ids)}, but the model's vocabulary has "
                f"{self.config.vocab_size}; the two do not belong together"
            )
        return ids

    def _eos_ids(self, params: SamplingParams, ends: frozenset[int] = frozenset()) -> frozenset[int]:
        """The ids that end an answer. ends: those of its chat."""
        asked = {*params.stop_token_ids}
        if self.tokenizer is not None:  # a special token is no part of the text, where its string could be found
            asked.update(i for i in map(self.tokenizer.special_id, params.stop) if i is not None)
        if params.ignore_eos:
            return frozenset(asked)
        own = self.tokenizer.eos_ids if self.tokenizer else frozenset(self.config.eos_token_ids)
        return own | ends | asked
