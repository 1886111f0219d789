"""A model that is loaded: its weights, its settings, and what all requests share. Knows no request."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastkv.cache.layer import EntryShape
from fastkv.cache.layer_map import Sources
from fastkv.cache.policies import FastKV
from fastkv.cache.policy import Policy
from fastkv.engine.attention import check_backend
from fastkv.engine.compile import compile_layers
from fastkv.engine.device import resolve_device, resolve_dtype, resolve_rank_device
from fastkv.engine.loading import load_parts
from fastkv.engine.memory import check_fits, explain_out_of_memory
from fastkv.engine.prefix_store import PrefixStore
from fastkv.engine.process import check_process, has_model, process_for_model
from fastkv.engine.runtime import Runtime
from fastkv.engine.shared_layers import check_alike, pairs_of, sources_of
from fastkv.engine.speculation.figures import DRAFT_WEIGHTS
from fastkv.errors import FastKVError, brief, check_choice, check_integer, check_switch, writable
from fastkv.kernels.out_of_memory import LOADING
from fastkv.kernels.packing import KV_DTYPES
from fastkv.kernels.ranks import ProcessRanks, Ranks, check_started
from fastkv.kernels.threads import as_many, step_threads
from fastkv.models.checkpoint import stored_dtype
from fastkv.models.config import DTYPES, ModelConfig
from fastkv.models.hub import model_folder
from fastkv.models.llama import Llama
from fastkv.models.presets import PRESETS
from fastkv.models.split import join, part_of
from fastkv.models.text.tokenizer import Tokenizer
from fastkv.models.tying import settled_config
from fastkv.models.weights import copy_bytes, in_integers, load_weights, random_weights

LOAD_FORMATS = ("auto", "dummy")
WEIGHTS = ("int8",)
_DTYPES = [getattr(torch, name) for name in DTYPES]

_log = logging.getLogger(__name__)


class LoadedModel:
    """What LLM takes to begin with, and may be told later: see there."""

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
        offload: bool = False,
        draft_weights: str | None = None,
        tensor_parallel: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        _check_arguments(model, revision, load_format, weights, progress)
        if draft_weights is not None:
            check_choice("draft_weights", draft_weights, DRAFT_WEIGHTS)
            if weights == draft_weights:
                raise FastKVError("the weights are int8 already: leave one of them out", setting="draft_weights")
        for name, switch in (("cuda_graph", cuda_graph), ("compile", compile), ("offload", offload)):
            check_switch(name, switch)
        if offload and attention != "auto":
            raise FastKVError("offload attends in a way of its own: leave attention or it out", setting="offload")
        self.offload = offload
        check_integer("prefix_cache", prefix_cache, 0)
        check_started(tensor_parallel)
        self._prefixes = PrefixStore(prefix_cache) if prefix_cache else None
        self._check_kv_dtype(kv_dtype)
        if tensor_parallel > 1:
            _check_parallel(compile=compile, prefix_cache=prefix_cache, draft_weights=draft_weights, offload=offload)
        target = resolve_device(device) if tensor_parallel == 1 else resolve_rank_device(device)
        self._process, self._tensor_parallel = process_for_model(target), tensor_parallel
        dummy = load_format == "dummy"
        folder = self._folder = Path(model) if dummy and model in PRESETS else model_folder(model, revision)
        if writable(str(folder)) != str(folder):
            raise FastKVError(f"{folder}: the libraries that read models take no such name; rename it, or link to it")
        self.config = PRESETS[str(model)] if dummy and model in PRESETS else ModelConfig.from_pretrained(folder)
        self.policy = FastKV() if policy is None else policy
        self._sources: Sources = ()
        self.kv_dtype = kv_dtype
        sources = self._sources_of(share_layers)
        ranks = None if tensor_parallel == 1 else ProcessRanks.of_this_process(target.type)
        torch_dtype = resolve_dtype(dtype, self.config.dtype or ("float32" if dummy else stored_dtype(folder)), target)
        if ranks is not None:  # what is faster may differ from one to the other
            torch_dtype = _DTYPES[ranks.number(_DTYPES.index(torch_dtype), target)]
        if not dummy:
            self.config = settled_config(self.config, folder, torch_dtype)
        own = self.config if ranks is None else part_of(self.config, ranks.rank, ranks.count)
        parts = load_parts(own, None if dummy else folder, torch_dtype, weights, target)
        if draft_weights is not None:
            parts["weights of drafts"] = copy_bytes(self.config, draft_weights, weights)
        advice = "take a smaller model, a device with more memory, --dtype bfloat16 or --weights int8"
        check_fits(f"the model {folder.name}", parts, target, advice, ranks=ranks)
        # Only now are the sizes known to be those of a model that there is room for.
        heads = (own.n_heads, own.n_kv_heads)
        check_backend(attention, heads, self.config.head_dim, torch_dtype, target)
        self.tokenizer = Tokenizer.from_pretrained(folder, self.config)
        if dummy:
            self._model = random_weights(own, torch_dtype, target, weights=weights)
        else:
            self._model = load_weights(own, folder, torch_dtype, target, progress, weights, settled=True)
        if ranks is not None:
            join(self._model, ranks)
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
        self._entry = EntryShape(self._model.config.n_kv_heads, self.config.head_dim, self._model.dtype)
        largest = max(self._model.blocks[0].parameters(), key=Tensor.numel)
        cuda_graph = cuda_graph and self._device.type == "cuda"
        threads = step_threads(largest)
        self._runtime, self._drafting = (
            Runtime(each, cuda_graph, attention, threads) for each in (self._model, drafting)
        )
        for model in models:
            if model.row is not None:
                with as_many(threads):
                    model.row.prepare(kv_dtype=self.kv_dtype)

    def _check_process(self) -> None:
        check_process(self._process, self._device, self._runtime.step_threads)

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
    def ranks(self) -> Ranks | None:
        """Those that hold the model together with this process; None: it is whole here."""
        return self._model.ranks

    def _refuse_ranks(self, what: str, setting: str | None = None) -> None:
        """FastKVError where the model is shared out over ranks, which do not do this."""
        if self._model.ranks is not None:
            raise FastKVError(f"{what} does not go with tensor_parallel: leave one of the two out", setting=setting)

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

    def _checked_policy(self, policy: Policy) -> Policy:
        if not isinstance(policy, Policy):
            raise FastKVError(f"policy must be a policy such as FastKV() or FullKV(), not {brief(policy)}")
        policy.validate(self.config.n_layers, self.config.n_kv_heads)
        if not policy.splits_heads and self._tensor_parallel > 1:
            raise FastKVError(
                f"policy {policy.name} does not say that it works where ranks have a part of the heads each "
                "(Policy.splits_heads): take another one, or leave tensor_parallel out"
            )
        return policy


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


def _check_parallel(**others: Any) -> None:
    """FastKVError for what does not go with tensor_parallel yet."""
    for name, value in others.items():
        if value:
            raise FastKVError(f"{name} does not go with tensor_parallel: leave one of the two out", setting=name)
