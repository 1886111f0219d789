"""LLM: a loaded model with its tokenizer and policy. The engine's front door; holds no state of any request.

How it is loaded stands in loaded.py, how a request is checked in checked.py.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Sequence
from os import PathLike
from typing import Any, overload

import torch
from torch import Tensor

from fastkv.cache.decode_budget import DecodeBudget
from fastkv.cache.kv_cache import KVCache, check_cache
from fastkv.cache.policy import Policy
from fastkv.engine.batch import DEFAULT_BATCH_SIZE, Batch, run_batch
from fastkv.engine.checked import CheckedRequests
from fastkv.engine.decode import decode_step
from fastkv.engine.footprint import footprint
from fastkv.engine.generation import Generation
from fastkv.engine.memory import explain_out_of_memory, raise_if_out_of_memory
from fastkv.engine.offloading.run import kind_of
from fastkv.engine.output import Output
from fastkv.engine.plan import plan_request, position_limit
from fastkv.engine.prefill import Prefill, prefill
from fastkv.engine.prefix import check_reuse, share
from fastkv.engine.prefix_store import continued
from fastkv.engine.request import (
    Sizes,
    check_sessions,
    id_tensor,
    is_batch,
    params_of_each,
    step_tensor,
)
from fastkv.engine.sampler import SamplingParams
from fastkv.engine.session import DEFAULT_POLICY, Session
from fastkv.engine.session_file import read_session
from fastkv.engine.speculation.figures import Speculation
from fastkv.engine.turn import Turn
from fastkv.errors import FastKVError, check_integer, check_switch
from fastkv.kernels.out_of_memory import REQUEST
from fastkv.models.text.chat import ChatIds


class LLM(CheckedRequests):
    """A model that generates text.

    model: a local folder, or a hub id that is downloaded. policy: None means FastKV() for this model. dtype: "auto"
    (the checkpoint's; float32 on a CPU that cannot compute in it) | "float32" | "bfloat16" | "float16". device: "auto"
    (a GPU if there is one) | "cpu" | "cuda" | "cuda:N". revision: of a hub id. weights: "int8" keeps every matrix in
    8-bit integers, a quarter of float32's bytes; activations and cache stay in `dtype`. None: all in `dtype`.
    draft_weights: "int8" or "int4" makes a second copy of the weights in 8 or 4 bits (the head always in 8), which
    drafts the tokens of requests with speculation="self"; None: the model's own draft.
    kv_dtype: "int8" or "int4" for entries of a quarter or an eighth of float32's bits (cache/quantised.py); None: all
    in `dtype`.
    share_layers: layers that store no entries and read an earlier layer's (KVSharer, arXiv 2410.18517): the file that
    `fastkv-eval share-layers` wrote for this model, or {reader: source}; None: every layer has its own.

    load_format: "auto", or "dummy" for random weights, to measure speed: then `model` may also be the name of a preset
    (models/presets.py: "llama-3.1-8b", "qwen3-32b", …), and a folder needs no more than its config.json.

    cuda_graph: on a GPU, decode by replaying captured graphs; a CPU has none. compile: run the layers through torch's
    compiler, which makes the first request up to a minute slower, the first one of several prompts together, too, and
    the next ones faster; on a CPU the steps of a single sequence are compiled here, and kept in the cache folder.
    attention: the kernels of causal attention, "auto" (on a GPU the first that works of these four) | "cudnn" | "flash"
    | "efficient" | "math". tensor_parallel: processes, started by torchrun, that hold the model together, each a part
    of the heads, of the MLP and of every cache; all of them make the same calls (docs/parallel.md). prefix_cache: bytes
    of K and V that are kept of the last prompts, in which nothing was dropped: one that begins like one of them (in 64
    tokens or more, and alone, not in a list) reads only the rest; 0 keeps none. offload: where a prompt does not fit on
    the device, let its hidden states and K and V of one layer lie in host memory while it is read (engine/offloading),
    so that host memory is the limit. For policies that say `scores_on_host`, and prompts that begin a sequence.
    progress: called while stored weights are read, with the bytes read and the bytes in all.

    Raises FastKVError for a folder that cannot be loaded and for settings that do not fit; nothing is loaded then.
    """

    @overload
    def generate(
        self,
        prompt: str | list[int] | Turn,
        params: SamplingParams | None = None,
        policy: Policy | None = None,
        *,
        decode_budget: int | None = None,
        speculation: str | None = None,
        draft_tokens: int | None = None,
    ) -> Output: ...

    @overload
    def generate(
        self,
        prompt: list[str] | list[list[int]] | list[str | list[int] | Turn],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        policy: Policy | None = None,
        *,
        decode_budget: int | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        kv_memory: int | None = None,
        reuse_prefix: bool | None = None,
    ) -> list[Output]: ...

    def generate(
        self,
        prompt: Any,
        params: Any = None,
        policy: Policy | None = None,
        *,
        decode_budget: int | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        kv_memory: int | None = None,
        reuse_prefix: bool | None = None,
        speculation: str | None = None,
        draft_tokens: int | None = None,
    ) -> Any:
        """Continue a prompt (text or token ids), or each of a list of prompts, several of them together.

        params: None means SamplingParams(); for a list of prompts also a list of as many. policy: None means
        self.policy. A text gets the tokenizer's BOS, ids are taken as they are. What continues a session is
        `session.turn(prompt)`, alone or in a list, and goes by its session's policy. Every prompt is checked before the
        first one runs. A list is worked on as `generate_each` says, and returned in its order.

        decode_budget: entries that each KV head holds at most while an answer grows, and an interval more
        (cache/decode_budget.py); None: all. What is dropped of prompt and answer is forgotten.

        speculation, of one prompt: "self" answers as the full cache does, token for token, and faster where drafts over
        the entries that the policy keeps (and by `draft_weights`) are often right; the policy propagates all tokens
        then, and both caches take memory. "ngram" keeps the policy's answer, and drafts what followed the last tokens
        earlier in the text. draft_tokens: at a time, 1 to 16; None: as many as pay, or none, by time and acceptance so
        far. `Output.metrics.speculation` tells what it brought (engine/speculation/speculative.py).

        Raises FastKVError for an empty prompt, ids outside the vocabulary, a prompt or max_tokens beyond the context,
        a text where the model has no tokenizer, a decode_budget below 32, and speculation with a list of prompts, a
        session's turn or a decode_budget.
        """
        speculated: dict[str, Any] = {"speculation": speculation, "draft_tokens": draft_tokens}
        if not is_batch(prompt):
            # which refuses an empty list as the empty prompt that it is
            stream = self.stream(prompt, params, policy, decode_budget=decode_budget, **speculated)
            if batch_size != DEFAULT_BATCH_SIZE or kv_memory is not None:
                raise FastKVError("batch_size and kv_memory are for a list of prompts")
            if reuse_prefix is not None:
                raise FastKVError("reuse_prefix is for a list of prompts", setting="reuse_prefix")
            return _finish(stream)
        if speculation is not None or draft_tokens is not None:
            raise FastKVError(
                "speculation is for one prompt at a time: leave it out, or give the prompts one by one",
                setting="speculation",
            )
        limits: dict[str, Any] = {"batch_size": batch_size, "kv_memory": kv_memory, "reuse_prefix": reuse_prefix}
        each = self.generate_each(prompt, params, policy, decode_budget=decode_budget, **limits)
        return [output for _, output in sorted(each, key=lambda done: done[0])]

    def generate_each(
        self,
        prompts: Sequence[str | list[int] | Turn],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        policy: Policy | None = None,
        *,
        decode_budget: int | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        kv_memory: int | None = None,
        reuse_prefix: bool | None = None,
    ) -> Iterator[tuple[int, Output]]:
        """Continue many prompts: (index, output) of each as soon as it is done.

        Each prompt is prefilled on its own; up to `batch_size` of them decode together, each with its own position,
        stop rules and sampling settings, and one that is done makes room for the next. kv_memory: bytes that their KV
        caches may take together (None: what the device has left); fewer decode together where they do not fit.

        Prompts that begin alike share the prefill of that beginning (64 tokens or more, where there is memory for a
        copy of its entries), if nothing of them is dropped: under policy full, or where a policy's budgets take all.
        Sums are then rounded otherwise, which decides near ties only. reuse_prefix: True does so under other policies,
        too, with other answers: the shared beginning is compressed by itself, without knowing what comes after it, and
        the rest of each prompt is kept whole. Which beginning that is depends on the list. False never does.

        Raises FastKVError as `generate` does, before anything runs; its `prompt` is the index of the one at fault.
        """
        called_at = time.perf_counter()
        if not isinstance(prompts, Sequence) or isinstance(prompts, (str, bytes)):
            raise FastKVError(f"prompts must be a list of prompts, not {type(prompts).__name__}")
        check_integer("batch_size", batch_size, 1)
        if kv_memory is not None:
            check_integer("kv_memory", kv_memory, 1)
        if reuse_prefix is not None:
            check_switch("reuse_prefix", reuse_prefix)
        policy = self.policy if policy is None else self._checked_policy(policy)
        if reuse_prefix:
            check_reuse(policy, self.config)
            if self._sources:
                self._refuse_shared("reuse_prefix")
        each = zip(prompts, params_of_each(params, len(prompts)), strict=True)
        fitting: set[Sizes] = set()
        budget = None if decode_budget is None else DecodeBudget(decode_budget)
        requests = [
            self._request_of(i, prompt, chosen, policy, fitting, budget) for i, (prompt, chosen) in enumerate(each)
        ]
        check_sessions(requests)
        if not requests:
            return iter(())
        work = share(self._runtime, requests, policy, reuse_prefix, batch_size, kv_memory, self._told)
        return Batch(run_batch(self._runtime, self.tokenizer, work.requests, work.n_slots, called_at, work.kv_memory))

    def stream(
        self,
        prompt: str | list[int] | Turn,
        params: SamplingParams | None = None,
        policy: Policy | None = None,
        *,
        keep_selection: bool = False,
        decode_budget: int | None = None,
        speculation: str | None = None,
        draft_tokens: int | None = None,
    ) -> Generation:
        """Like `generate` for one prompt, as an iterator of Piece(text, token_id).

        Mistakes are raised here, before the first piece. The iterator's `output()` is what `generate` returns; on a
        stream that was left early it tells what came so far. keep_selection: let it hold on to which tokens each layer
        saw and kept, as its `selection`.
        """
        called_at = time.perf_counter()
        check_switch("keep_selection", keep_selection)
        if keep_selection:
            self._refuse_ranks("keep_selection", "report")
        if isinstance(prompt, Turn) and policy is not None:
            raise FastKVError("a turn goes by its session's policy: leave policy out")
        budget = None if decode_budget is None else DecodeBudget(decode_budget)
        if speculation is None and draft_tokens is not None:
            raise FastKVError("draft_tokens is for speculation: leave it out, or say which", setting="draft_tokens")
        if speculation is not None:
            self._refuse_ranks("speculation", "speculation")
            asked = Speculation(speculation, draft_tokens)
            request = self._speculating(prompt, params, policy, asked, budget, keep_selection)
            drafting = self._drafting if asked.kind == "self" else None
            return Generation(self._runtime, self.tokenizer, request, called_at, keep_selection, drafting=drafting)
        request = self._request(prompt, params, policy, decode_budget=budget)
        whole = request.turn is None and budget is None and request.plan.is_exact and request.plan.offload is None
        store = self._prefixes if whole and not keep_selection else None
        if store is not None:
            with explain_out_of_memory(REQUEST):
                request = continued(self._runtime, request, store)
        return Generation(self._runtime, self.tokenizer, request, called_at, keep_selection, store)

    def session(self, policy: Policy | None = None, *, system: str | None = None) -> Session:
        """A conversation, or a document to ask many things of: see Session.

        policy: what is kept of that; None means DEFAULT_POLICY of engine/session.py, which needs no question to choose
        by. system: a message that `Session.chat` puts before all others. Raises FastKVError for a policy that does not
        fit the model.
        """
        if self._sources:
            self._refuse_shared("sessions")
        chosen = self._checked_policy(DEFAULT_POLICY if policy is None else policy)
        return Session(self, chosen, system)

    def load_session(self, path: str | PathLike[str]) -> Session:
        """The session that Session.save wrote, with its policy. Its next turns give the tokens that they gave there.

        The entries stay in the file, mapped into memory, until a turn copies them to the device; the file may be saved
        anew or deleted meanwhile. All of it is read once here, to see that no byte has changed. Raises FastKVError for
        a file that is none, is not whole or was altered, or is of another version, model, dtype or kind of weights
        (int8 weights give other tokens), or of more tokens than the model's context.
        """
        if self._sources:
            self._refuse_shared("sessions")
        self._refuse_ranks("a session's file")
        saved = read_session(path, self._model)
        if self.kv_dtype is not None:
            raise FastKVError(
                f"{path}: the entries of a file go on in the model's dtype: leave kv_dtype out", setting="kv_dtype"
            )
        session = self.session(saved.policy)
        session.resume(saved)
        return session

    @explain_out_of_memory(REQUEST)
    def chat(self, messages: list[dict[str, str]], /, **arguments: Any) -> ChatIds:
        """Token ids of a conversation, ready for the model's answer, by the model's own chat template.

        The list knows which of its last tokens are the template's, so that a policy's observation window covers the end
        of the last message, too, and which special token the template writes after an answer, so that it ends the
        answer; a list made from it (ids + more) does not.
        messages: dicts with `role` and `content`. arguments: variables of the template, such as enable_thinking=False.
        Raises FastKVError where the model has no tokenizer or no template, or the template does not use an argument.
        """
        encoded = self._required_tokenizer().encode_chat(messages, arguments, self.config.context_length)
        self._checked_encoding(encoded)
        return encoded

    @explain_out_of_memory(REQUEST)
    def prefill(
        self,
        token_ids: list[int] | Tensor,
        policy: Policy | None = None,
        max_tokens: int = 256,
        *,
        cache: KVCache | None = None,
    ) -> Prefill:
        """Run new tokens through the layers and decode nothing.

        token_ids: list[int], or an integer tensor [B, N], of B sequences that are equally long. max_tokens: the room
        that the cache gets for `decode`.

        cache: what an earlier prefill left. The sequence continues after what it holds, in that very cache: new tokens
        attend to every entry kept so far, and causally to one another. A policy that can (Policy.compresses_again)
        chooses anew among those entries and the new tokens, its budget counting from the whole sequence; else what was
        kept stays, and the new tokens are kept whole. TSP works on the new tokens.

        Returns logits [B, V] float32, the tokens that each layer saw, the entries that it kept, and the cache.
        Raises FastKVError as `generate` does, and for a cache that is not of this model.
        """
        if os.getpid() != self._process:
            self._check_process()
        check_integer("max_tokens", max_tokens, 0)
        ids = id_tensor(token_ids, self.config.vocab_size).to(self.device)
        policy = self.policy if policy is None else self._checked_policy(policy)
        if cache is not None:
            check_cache(cache, self.config.n_layers, self._entry, self._device)
            if ids.shape[0] != cache.batch:
                raise FastKVError(f"the cache holds {cache.batch} sequences, but the new tokens are of {ids.shape[0]}")
        limit = position_limit(self.config, policy, ids.shape[1], cache)
        sizes = ids.shape[1], max_tokens, self.dtype, limit
        ways: dict[str, Any] = {
            "kv_dtype": self.kv_dtype,
            "shared": self._sources if cache is None else cache.pool.shared,
        }
        plan = self._agreed(plan_request(self._model.config, policy, *sizes, cache, self._told, **ways))
        new = 0 if plan.compresses else plan.n_tokens + max_tokens
        fits = cache is not None and cache.has_room(plan.capacities, new)
        new_cache = 0 if cache is not None and fits else ids.shape[0] * plan.nbytes
        plan = self._fitting(plan, lambda way: footprint(self._model, way, new_cache, ids.shape[0]), pool=False)
        if cache is None:
            cache = plan.new_cache(ids.shape[0], self.device)
        elif not fits:
            cache.make_room(plan.capacities, new)
        buffers = self._runtime.buffers.lease()
        eos_ids = self._eos_ids(SamplingParams())
        given = (ids, plan, cache, buffers.workspace, self._runtime.attention, eos_ids)
        result = prefill(self._model, *given, None, kind_of(plan))
        self._runtime.buffers.give_back(buffers)
        return dataclasses.replace(result, logits=result.logits.clone())  # a tensor like any other: writable

    def decode(self, cache: KVCache, token_ids: Tensor) -> Tensor:
        """Append tokens to the sequences of a cache; logits float32 of the token after each.

        token_ids: int64 [B] -> [B, V], or [B, T], T tokens for each sequence -> [B, T, V].
        Raises FastKVError when the cache or the model's context is full, for the wrong number or kind of tokens, and
        for a cache that is not of this model; nothing has changed then.
        """
        if os.getpid() != self._process:
            self._check_process()
        check_cache(cache, self.config.n_layers, self._entry, self._device)
        ids = step_tensor(token_ids, cache.batch, self.config.vocab_size).to(self._device)
        handled = sys.exc_info()[1]
        try:
            logits = decode_step(self._model, cache, ids).clone()
        except Exception as error:  # not explain_out_of_memory: a step is to be quick
            raise_if_out_of_memory(error, REQUEST, handled)
            raise
        return logits if torch.as_tensor(token_ids).dim() == 2 else logits[:, 0]


def _finish(generation: Generation) -> Output:
    try:
        for _ in generation:
            pass
    finally:
        generation.close()  # what is interrupted hands its memory on, and a session can go on
    return generation.output()
