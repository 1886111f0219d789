"""LLM: a loaded model with its tokenizer and policy. The engine's front door; holds no state of any request."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn, overload

import torch
from torch import Tensor

from fastkv.cache.decode_budget import DecodeBudget
from fastkv.cache.kv_cache import KVCache, check_cache
from fastkv.cache.layer import EntryShape
from fastkv.cache.layer_map import Sources
from fastkv.cache.policies import FastKV, FullKV
from fastkv.cache.policy import Policy
from fastkv.cache.pool import bytes_of
from fastkv.engine.attention import check_backend
from fastkv.engine.batch import DEFAULT_BATCH_SIZE, Batch, run_batch
from fastkv.engine.compile import compile_layers
from fastkv.engine.decode import decode_step
from fastkv.engine.decode_batch import capacities_of, layout_of
from fastkv.engine.device import resolve_device, resolve_dtype
from fastkv.engine.footprint import Footprint, footprint
from fastkv.engine.generation import Generation
from fastkv.engine.loading import load_parts
from fastkv.engine.memory import check_fits, explain_out_of_memory, raise_if_out_of_memory
from fastkv.engine.output import Output
from fastkv.engine.plan import RequestPlan, plan_request, position_limit
from fastkv.engine.prefill import Prefill, prefill
from fastkv.engine.prefix import check_reuse, share
from fastkv.engine.prefix_store import PrefixStore, continued
from fastkv.engine.process import check_process, has_model, process_for_model
from fastkv.engine.request import (
    Request,
    Sizes,
    answer_length,
    check_request_fits,
    check_sessions,
    id_tensor,
    is_batch,
    params_of_each,
    step_tensor,
)
from fastkv.engine.runtime import Runtime
from fastkv.engine.sampler import SamplingParams
from fastkv.engine.session import DEFAULT_POLICY, Session
from fastkv.engine.session_file import read_session
from fastkv.engine.shared_layers import check_alike, pairs_of, sources_of
from fastkv.engine.speculation.asking import drafted_by_model, drafted_from_text
from fastkv.engine.speculation.figures import DRAFT_WEIGHTS, Speculation
from fastkv.engine.turn import Turn
from fastkv.errors import FastKVError, brief, check_choice, check_integer, check_switch, writable
from fastkv.kernels.out_of_memory import LOADING, REQUEST
from fastkv.kernels.packing import KV_DTYPES
from fastkv.kernels.threads import as_many, step_threads
from fastkv.models.checkpoint import stored_dtype
from fastkv.models.config import ModelConfig
from fastkv.models.hub import model_folder
from fastkv.models.llama import Llama
from fastkv.models.presets import PRESETS
from fastkv.models.text.chat import ChatIds
from fastkv.models.text.tokenizer import Tokenizer
from fastkv.models.tying import settled_config
from fastkv.models.weights import copy_bytes, in_integers, load_weights, random_weights

LOAD_FORMATS = ("auto", "dummy")
WEIGHTS = ("int8",)

_log = logging.getLogger(__name__)


class LLM:
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
    ("llama-3.1-8b", "llama-3.2-1b", "llama-100m"), and a folder needs no more than its config.json.

    cuda_graph: on a GPU, decode by replaying captured graphs; a CPU has none. compile: run the layers through torch's
    compiler, which makes the first request up to a minute slower, the first one of several prompts together, too, and
    the next ones faster; on a CPU the steps of a single sequence are compiled here, and kept in the cache folder.
    attention: the kernels of causal attention, "auto" (on a GPU the first that works of these four) | "cudnn" | "flash"
    | "efficient" | "math". prefix_cache: bytes of K and V that are kept of the last prompts, in which nothing was
    dropped: one that begins like one of them (in 64 tokens or more, and alone, not in a list) reads only the rest;
    0 keeps none. progress: called while stored weights are read, with the bytes read and the bytes in all.

    Raises FastKVError for a folder that cannot be loaded and for settings that do not fit; nothing is loaded then.
    """

    config: ModelConfig
    tokenizer: Tokenizer | None

    @explain_out_of_memory(LOADING)
    def __init__(
        self,
        model: str | Path,
        *,
        policy: Policy | None = None,
        dtype: str = "auto",
        weights: str | None = None,
        kv_dtype: str | None = None,
        share_layers: str | PathLike[str] | Mapping[int, int] | None = None,
        device: str | torch.device = "auto",
        revision: str | None = None,
        load_format: str = "auto",
        cuda_graph: bool = True,
        compile: bool = False,
        attention: str = "auto",
        prefix_cache: int = 0,
        draft_weights: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        _check_arguments(model, revision, load_format, weights, progress)
        if draft_weights is not None:
            check_choice("draft_weights", draft_weights, DRAFT_WEIGHTS)
            if weights == draft_weights:
                raise FastKVError("the weights are int8 already: leave one of them out", setting="draft_weights")
        for name, switch in (("cuda_graph", cuda_graph), ("compile", compile)):
            check_switch(name, switch)
        check_integer("prefix_cache", prefix_cache, 0)
        self._prefixes = PrefixStore(prefix_cache) if prefix_cache else None
        self._check_kv_dtype(kv_dtype)
        target = resolve_device(device)
        self._process = process_for_model(target)
        dummy = load_format == "dummy"
        folder = self._folder = Path(model) if dummy and model in PRESETS else model_folder(model, revision)
        if writable(str(folder)) != str(folder):
            raise FastKVError(f"{folder}: the libraries that read models take no such name; rename it, or link to it")
        self.config = PRESETS[str(model)] if dummy and model in PRESETS else ModelConfig.from_pretrained(folder)
        self.policy = FastKV() if policy is None else policy
        self._sources: Sources = ()
        self.kv_dtype = kv_dtype
        sources = self._sources_of(share_layers)
        torch_dtype = resolve_dtype(dtype, self.config.dtype or ("float32" if dummy else stored_dtype(folder)), target)
        if not dummy:
            self.config = settled_config(self.config, folder, torch_dtype)
        parts = load_parts(self.config, None if dummy else folder, torch_dtype, weights, target)
        if draft_weights is not None:
            parts["weights of drafts"] = copy_bytes(self.config, draft_weights, weights)
        advice = "take a smaller model, a device with more memory, --dtype bfloat16 or --weights int8"
        check_fits(f"the model {folder.name}", parts, target, advice)
        # Only now are the sizes known to be those of a model that there is room for.
        heads = (self.config.n_heads, self.config.n_kv_heads)
        check_backend(attention, heads, self.config.head_dim, torch_dtype, target)
        self.tokenizer = Tokenizer.from_pretrained(folder, self.config)
        if dummy:
            self._model = random_weights(self.config, torch_dtype, target, weights=weights)
        else:
            self._model = load_weights(self.config, folder, torch_dtype, target, progress, weights, settled=True)
        has_model()
        check_alike(self._model, sources)
        self._sources = sources
        if draft_weights == "int4" and not compile:
            _log.warning("drafts of int4 weights are slow without compile (--compile): add it, or take int8")
        self._prepare(cuda_graph, compile, attention, draft_weights)

    def _prepare(self, cuda_graph: bool, compile: bool, attention: str, draft_weights: str | None) -> None:
        """Make what requests share."""
        drafting = self._model if draft_weights is None else in_integers(self._model, draft_weights)
        models = [self._model] if drafting is self._model else [self._model, drafting]
        if compile:
            for model in models:
                compile_layers(model)
        self._device = self._model.device
        self._entry = EntryShape(self.config.n_kv_heads, self.config.head_dim, self._model.dtype)
        largest = max(self._model.blocks[0].parameters(), key=Tensor.numel)
        cuda_graph = cuda_graph and self._device.type == "cuda"
        threads = step_threads(largest)
        self._runtime, self._drafting = (
            Runtime(each, cuda_graph, attention, threads) for each in (self._model, drafting)
        )
        for model in models:
            if model.row is not None:
                with as_many(threads):
                    model.row.prepare()

    @property
    def policy(self) -> Policy:
        """The policy of requests that bring none. Setting one that does not fit the model raises FastKVError."""
        return self._policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self._policy = self._checked_policy(policy)

    @property
    def kv_dtype(self) -> str | None:
        """In what the entries of a request are stored that begins: "int8", "int4", or None, the model's dtype.

        A session goes on as it began. Setting another one raises FastKVError, and so does one that prefix_cache, or an
        odd number of channels, does not go with.
        """
        return self._kv_dtype

    @kv_dtype.setter
    def kv_dtype(self, kv_dtype: str | None) -> None:
        self._check_kv_dtype(kv_dtype)
        if kv_dtype == "int4" and self.config.head_dim % 2:
            raise FastKVError(
                f"int4 stores channels in pairs, and the model's head_dim is {self.config.head_dim}; take int8",
                setting="kv_dtype",
            )
        self._kv_dtype = kv_dtype

    def _check_kv_dtype(self, kv_dtype: Any) -> None:
        if kv_dtype is None:
            return
        check_choice("kv_dtype", kv_dtype, KV_DTYPES)
        if self._prefixes is not None:
            raise FastKVError("prefix_cache keeps exact entries: leave it or kv_dtype out", setting="kv_dtype")

    @property
    def share_layers(self) -> Any:
        """Which layers of a request that begins read an earlier layer's entries: {reader: source}.

        Setting it takes what LLM(share_layers=…) takes. A cache goes on as it began. Raises FastKVError for a map that
        is none, or another model's, and where prefix_cache is on. Sessions, speculation, a decode_budget, kv_dtype and
        the policies that plan_request names do not go with it; each request that has one raises FastKVError.
        """
        return dict(pairs_of(self._sources))

    @share_layers.setter
    def share_layers(self, share_layers: Any) -> None:
        sources = self._sources_of(share_layers)
        check_alike(self._model, sources)
        self._sources = sources

    def _sources_of(self, share_layers: Any) -> Sources:
        sources = sources_of(share_layers, self.config.n_layers, self._folder)
        if sources and self._prefixes is not None:
            self._refuse_shared("prefix_cache")
        return sources

    def _refuse_shared(self, what: str) -> NoReturn:
        raise FastKVError(f"share_layers does not go with {what}: leave one of the two out", setting="share_layers")

    @property
    def model(self) -> Llama:
        """The network itself, for those who want to look into it."""
        return self._model

    @property
    def device(self) -> torch.device:
        return self._model.device

    @property
    def dtype(self) -> torch.dtype:
        return self._model.dtype

    def free_buffers(self) -> None:
        """Let go of the memory that requests hand to one another, and of what `prefix_cache` keeps."""
        self._runtime.buffers.clear()
        self._drafting.buffers.clear()
        if self._prefixes is not None:
            self._prefixes.clear()

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
        if isinstance(prompt, Turn) and policy is not None:
            raise FastKVError("a turn goes by its session's policy: leave policy out")
        budget = None if decode_budget is None else DecodeBudget(decode_budget)
        if speculation is None and draft_tokens is not None:
            raise FastKVError("draft_tokens is for speculation: leave it out, or say which", setting="draft_tokens")
        if speculation is not None:
            return self._speculating(
                prompt, params, policy, Speculation(speculation, draft_tokens), budget, called_at, keep_selection
            )
        request = self._request(prompt, params, policy, decode_budget=budget)
        whole = request.turn is None and budget is None and request.plan.is_exact
        store = self._prefixes if whole and not keep_selection else None
        if store is not None:
            with explain_out_of_memory(REQUEST):
                request = continued(self._runtime, request, store)
        return Generation(self._runtime, self.tokenizer, request, called_at, keep_selection, store)

    def _speculating(
        self,
        prompt: Any,
        params: SamplingParams | None,
        policy: Policy | None,
        speculation: Speculation,
        budget: DecodeBudget | None,
        called_at: float,
        keep_selection: bool,
    ) -> Generation:
        """The stream of a request whose tokens are drafted."""
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
        if by_model:
            room = position_limit(self.config, drafts, request.plan.n_tokens) - request.plan.n_tokens
            if 0 < room < request.max_tokens and request.params.max_tokens is None:  # nobody asked for so many
                request = self._request(prompt, dataclasses.replace(request.params, max_tokens=room), FullKV())
            drafts = drafts.covering(getattr(prompt, "tail", 0), request.plan.n_tokens)
            request = drafted_by_model(self._runtime, self._drafting, request, drafts, speculation, self._told)
        else:
            request = drafted_from_text(self._runtime, request, speculation)
        drafting = self._drafting if by_model else None
        return Generation(self._runtime, self.tokenizer, request, called_at, keep_selection, drafting=drafting)

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
        plan = plan_request(self.config, policy, *sizes, cache, self._told, **ways)
        new = 0 if plan.compresses else plan.n_tokens + max_tokens
        fits = cache is not None and cache.has_room(plan.capacities, new)
        new_cache = 0 if cache is not None and fits else ids.shape[0] * plan.nbytes
        self._check_fits(plan, footprint(self._model, plan, new_cache, ids.shape[0]), pool=False)
        if cache is None:
            cache = plan.new_cache(ids.shape[0], self.device)
        elif not fits:
            cache.make_room(plan.capacities, new)
        buffers = self._runtime.buffers.lease()
        eos_ids = self._eos_ids(SamplingParams())
        result = prefill(self._model, ids, plan, cache, buffers.workspace, self._runtime.attention, eos_ids)
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

    def _check_process(self) -> None:
        check_process(self._process, self._device, self._runtime.step_threads)

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
        plan = plan_request(self.config, policy, *sizes, past, self._told, decode_budget, **ways)
        request = Request(ids, params, plan, self._eos_ids(params, getattr(prompt, "ends", frozenset())), turn)
        if fitting is None or request.sizes not in fitting:
            slot, draws = self._slot_bytes(request), params.temperature > 0
            kept = plan.nbytes if turn is not None and turn.keep else 0  # what the session then holds, beside the slot
            self._check_fits(plan, footprint(self._model, plan, slot + kept, draws=draws))
        if fitting is not None:
            fitting.add(request.sizes)
        return request

    def _slot_bytes(self, request: Request) -> int:
        """Bytes of the slot that a request is given if it is alone."""
        return bytes_of(layout_of([request]), capacities_of([request]), request.plan.shape)

    def _check_fits(self, plan: RequestPlan, needed: Footprint, pool: bool = True) -> None:
        """FastKVError where memory is too little. pool: whether the slots of earlier requests can be used again."""
        reusable = self._runtime.buffers.reusable(needed.cache if pool else 0, needed.workspace)
        check_request_fits(self._model, plan, needed, reusable)

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

    def _checked_policy(self, policy: Policy) -> Policy:
        if not isinstance(policy, Policy):
            raise FastKVError(f"policy must be a policy such as FastKV() or FullKV(), not {brief(policy)}")
        policy.validate(self.config.n_layers, self.config.n_kv_heads)
        return policy

    def _eos_ids(self, params: SamplingParams, ends: frozenset[int] = frozenset()) -> frozenset[int]:
        """The ids that end an answer. ends: those of its chat."""
        asked = {*params.stop_token_ids}
        if self.tokenizer is not None:  # a special token is no part of the text, where its string could be found
            asked.update(i for i in map(self.tokenizer.special_id, params.stop) if i is not None)
        if params.ignore_eos:
            return frozenset(asked)
        own = self.tokenizer.eos_ids if self.tokenizer else frozenset(self.config.eos_token_ids)
        return own | ends | asked


def _check_arguments(model: Any, revision: Any, load_format: Any, weights: Any, progress: Any) -> None:
    """FastKVError for an argument of LLM that is of no use, before anything is looked up."""
    if not isinstance(model, (str, PathLike)):
        raise FastKVError(f"model must be a folder or a hub id like org/name, not {brief(model)}")
    if revision is not None and not isinstance(revision, str):
        raise FastKVError(f"revision must be a text, not {brief(revision)}", setting="revision")
    if progress is not None and not callable(progress):
        raise FastKVError(f"progress must be a function, not {brief(progress)}")
    check_choice("load_format", load_format, LOAD_FORMATS)
    if weights is not None:
        check_choice("weights", weights, WEIGHTS)


def _finish(generation: Generation) -> Output:
    try:
        for _ in generation:
            pass
    finally:
        generation.close()  # what is interrupted hands its memory on, and a session can go on
    return generation.output()
