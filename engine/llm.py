"""LLM: a loaded model with its tokenizer and policy. The engine's front door; holds no state of any request."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from fastkv.cache.kv_cache import KVCache
from fastkv.cache.policies import FastKV
from fastkv.cache.policy import Policy, drops_tokens, plan_layers
from fastkv.engine.decode import decode_step
from fastkv.engine.device import resolve_device, resolve_dtype
from fastkv.engine.generation import Generation, Request
from fastkv.engine.memory import check_fits, explain_out_of_memory
from fastkv.engine.output import Output
from fastkv.engine.prefill import Prefill, prefill
from fastkv.engine.progress import LoadingLine
from fastkv.engine.sampler import SamplingParams
from fastkv.errors import FastKVError, check_integer
from fastkv.models.checkpoint import stored_dtype
from fastkv.models.config import ModelConfig
from fastkv.models.hub import model_folder
from fastkv.models.tokenizer import Tokenizer
from fastkv.models.weights import load_weights, model_bytes

DEFAULT_MAX_TOKENS = 256


class LLM:
    """A model that generates text.

    model: a local folder, or a hub id that is downloaded. policy: None means FastKV() for this model. dtype: "auto"
    (the checkpoint's; float32 on a CPU that cannot compute in it) | "float32" | "bfloat16" | "float16". device: "auto"
    (a GPU if there is one) | "cpu" | "cuda" | "cuda:N". revision: of a hub id.

    Raises FastKVError for a folder that cannot be loaded and for settings that do not fit; nothing is loaded then.
    """

    config: ModelConfig
    tokenizer: Tokenizer | None
    policy: Policy

    def __init__(
        self,
        model: str | Path,
        *,
        policy: Policy | None = None,
        dtype: str = "auto",
        device: str | torch.device = "auto",
        revision: str | None = None,
    ) -> None:
        target = resolve_device(device)
        folder = self._folder = model_folder(model, revision)
        self.config = ModelConfig.from_pretrained(folder)
        self.policy = self._checked_policy(FastKV() if policy is None else policy)
        torch_dtype = resolve_dtype(dtype, self.config.dtype or stored_dtype(folder), target)
        self.tokenizer = Tokenizer.from_pretrained(folder, self.config)
        advice = "take a smaller model, a device with more memory, or --dtype bfloat16"
        check_fits(f"the model {folder.name}", model_bytes(self.config, torch_dtype), target, advice)
        with LoadingLine(sys.stderr) as line, explain_out_of_memory():
            self._model = load_weights(self.config, folder, torch_dtype, target, line.show)

    @property
    def device(self) -> torch.device:
        return self._model.device

    @property
    def dtype(self) -> torch.dtype:
        return self._model.dtype

    @overload
    def generate(
        self, prompt: str | list[int], params: SamplingParams | None = None, policy: Policy | None = None
    ) -> Output: ...

    @overload
    def generate(
        self,
        prompt: list[str] | list[list[int]],
        params: SamplingParams | None = None,
        policy: Policy | None = None,
    ) -> list[Output]: ...

    def generate(self, prompt: Any, params: SamplingParams | None = None, policy: Policy | None = None) -> Any:
        """Continue a prompt (text or token ids), or each of a list of prompts, one after another.

        params: None means SamplingParams(). policy: None means self.policy. A text gets the tokenizer's BOS, ids are
        taken as they are. Every prompt is checked before the first one runs.

        Raises FastKVError for an empty prompt, ids outside the vocabulary, a prompt or max_tokens beyond the context,
        and a text where the model has no tokenizer.
        """
        if _is_batch(prompt):
            requests = [self._request(one, params, policy) for one in prompt]
            return [_finish(Generation(self._model, self.tokenizer, request)) for request in requests]
        return _finish(self.stream(prompt, params, policy))

    def stream(
        self, prompt: str | list[int], params: SamplingParams | None = None, policy: Policy | None = None
    ) -> Generation:
        """Like `generate` for one prompt, as an iterator of Piece(text, token_id).

        Mistakes are raised here, before the first piece. The iterator's `output()` is what `generate` returns; on a
        stream that was left early it tells what came so far.
        """
        called_at = time.perf_counter()
        return Generation(self._model, self.tokenizer, self._request(prompt, params, policy), called_at)

    def prefill(self, token_ids: list[int] | Tensor, policy: Policy | None = None, max_tokens: int = 256) -> Prefill:
        """Run prompts of one length through the layers and decode nothing.

        token_ids: list[int], or an int64 tensor [B, N]. max_tokens: the room that the cache gets for `decode`.
        Returns logits [B, V] float32, the tokens that each layer saw, the entries that it kept, and the cache.
        Raises FastKVError as `generate` does.
        """
        check_integer("max_tokens", max_tokens, 0)
        ids = self._id_tensor(token_ids)
        policy = self.policy if policy is None else self._checked_policy(policy)
        limit = self._position_limit(policy, ids.shape[1])
        self._check_cache(policy, ids.shape[1], max_tokens, ids.shape[0])
        with explain_out_of_memory():
            return prefill(self._model, ids, policy, max_tokens, limit)

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, ready for the model's answer, by the model's own chat template.

        messages: dicts with `role` and `content`. Raises FastKVError where the model has no tokenizer or no template.
        """
        tokenizer = self._required_tokenizer()
        return self._checked_encoding(tokenizer.encode_chat(messages))

    def decode(self, cache: KVCache, token_ids: Tensor) -> Tensor:
        """One step: token_ids int64 [B] -> logits float32 [B, V] of the token after them; appends to `cache`.

        Raises FastKVError when the cache or the model's context is full, or for the wrong number of tokens.
        """
        token_ids = torch.as_tensor(token_ids, device=self.device)
        if token_ids.shape != (cache.batch,):
            raise FastKVError(f"decode takes one token id for each of {cache.batch} prompts, not {token_ids.tolist()}")
        self._check_ids(token_ids)
        return decode_step(self._model, cache, token_ids)

    def _request(self, prompt: str | list[int], params: SamplingParams | None, policy: Policy | None) -> Request:
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise FastKVError(f"params must be SamplingParams, not {type(params).__name__}")
        ids = self._token_ids(prompt)
        policy = self.policy if policy is None else self._checked_policy(policy)
        limit = self._position_limit(policy, len(ids))
        max_tokens = self._max_tokens(params, len(ids), limit)
        self._check_cache(policy, len(ids), max_tokens)
        return Request(ids, params, policy, max_tokens, limit, self._eos_ids(params))

    def _checked_policy(self, policy: Policy) -> Policy:
        if not isinstance(policy, Policy):
            raise FastKVError(f"policy must be a policy such as FastKV() or FullKV(), not {policy!r}")
        policy.validate(self.config.n_layers)
        return policy

    def _token_ids(self, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            ids = self._id_tensor(prompt)
            if ids.shape[0] != 1:
                raise FastKVError("generate and stream take a list of prompts, not a tensor of several; prefill does")
            return ids[0].tolist()
        tokenizer = self._required_tokenizer()
        if not prompt:
            raise FastKVError("the prompt is empty", setting="prompt")
        return self._checked_encoding(tokenizer.encode(prompt))

    def _required_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise FastKVError(f"{self._folder}: no tokenizer.json and no tokenizer.model, so text cannot be read")
        return self.tokenizer

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

    def _id_tensor(self, token_ids: list[int] | Tensor) -> Tensor:
        """list[int] or an integer tensor [B, N] -> int64 [B, N] on the device, every id inside the vocabulary."""
        try:
            ids = torch.as_tensor(token_ids)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise FastKVError(f"a prompt is a string or a list of token ids, not {_brief(token_ids)}") from None
        ids = ids.unsqueeze(0) if ids.dim() == 1 else ids
        if ids.numel() == 0:
            raise FastKVError("the prompt is empty")
        if ids.dim() != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise FastKVError(f"a prompt is a string or a list of token ids, not {_brief(token_ids)}")
        self._check_ids(ids)
        return ids.to(device=self.device, dtype=torch.int64)

    def _check_ids(self, ids: Tensor) -> None:
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.config.vocab_size:
            wrong = low if low < 0 else high
            raise FastKVError(f"token id {wrong} is outside the model's vocabulary of {self.config.vocab_size}")

    def _position_limit(self, policy: Policy, n_tokens: int) -> int:
        """The positions that the text may take, in tokens; FastKVError if the prompt alone takes more."""
        limit = self.config.context_length
        if n_tokens > limit:
            raise FastKVError(
                f"the prompt has {n_tokens} tokens, but the model's context (max_position_embeddings) is {limit}; "
                "shorten it",
                setting="prompt",
            )
        window = self.config.sliding_window
        if window is None or not drops_tokens(plan_layers(policy, self.config.n_layers, n_tokens)):
            return limit
        if n_tokens > window:
            raise FastKVError(
                f"the prompt has {n_tokens} tokens, more than the model's sliding_window of {window}, "
                f"where policy {policy.name} cannot drop tokens; use policy full, or shorten it",
                setting="prompt",
            )
        return min(limit, window)

    def _max_tokens(self, params: SamplingParams, n_tokens: int, limit: int) -> int:
        room = limit - n_tokens
        what = "context" if limit == self.config.context_length else "sliding_window"
        if room < 1:
            raise FastKVError(
                f"the prompt has {n_tokens} tokens and fills the model's {what} of {limit}; shorten it",
                setting="prompt",
            )
        if params.max_tokens is None:
            return min(DEFAULT_MAX_TOKENS, room)
        if params.max_tokens > room:
            raise FastKVError(
                f"max_tokens must be at most {room}: the prompt has {n_tokens} tokens and the model's {what} {limit}, "
                f"not {params.max_tokens}",
                setting="max_tokens",
            )
        return params.max_tokens

    def _check_cache(self, policy: Policy, n_tokens: int, max_tokens: int, batch: int = 1) -> None:
        kept = [plan.kept for plan in plan_layers(policy, self.config.n_layers, n_tokens)]
        values = KVCache.size_of(kept, max_tokens, self.config.n_kv_heads, self.config.head_dim)
        advice = "lower kv_retention or max_tokens, or shorten the prompt"
        check_fits("the KV cache", batch * values * self.dtype.itemsize, self.device, advice)

    def _eos_ids(self, params: SamplingParams) -> frozenset[int]:
        if params.ignore_eos:
            return frozenset()
        return self.tokenizer.eos_ids if self.tokenizer else frozenset(self.config.eos_token_ids)


def _is_batch(prompt: Any) -> bool:
    """Whether this is a list of prompts rather than one prompt."""
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and any(isinstance(one, (str, Sequence)) for one in prompt)
    )


def _finish(generation: Generation) -> Output:
    for _ in generation:
        pass
    return generation.output()


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
