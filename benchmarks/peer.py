"""Hugging Face's model on the very weights of an LLM, timed as one would use it: SDPA attention and its own cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from fastkv import LLM
from fastkv.models.weights import checkpoint_tensors

_HF_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "context_length": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
}


def hf_model(llm: LLM) -> Any:
    """The same Llama in transformers, with the same weights and default rotary scaling."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {theirs: getattr(llm.config, name) for name, theirs in _HF_NAMES.items()}
    # Rotary scaling changes the values, not the work; a preset's own is left out here.
    config = LlamaConfig(**settings, rope_parameters={"rope_type": "default", "rope_theta": llm.config.rope.theta})
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device=llm.device).to(llm.dtype)
    model.load_state_dict(checkpoint_tensors(llm._model), strict=not llm.config.tie_word_embeddings)
    model.tie_weights()
    # to_empty has emptied the rotary table too
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(llm.device)
    return model.eval()


def transformers_peer(llm: LLM) -> Callable[[list[int], int], tuple[float, float]]:
    """A greedy request there: (seconds to the first token, tokens/s after it)."""
    model = hf_model(llm)

    @torch.inference_mode()
    def run(ids: list[int], new_tokens: int) -> tuple[float, float]:
        started = time.perf_counter()
        prompt = torch.tensor([ids], device=llm.device)
        output = model(prompt, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        int(token)
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            output = model(token, past_key_values=output.past_key_values, use_cache=True)
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            int(token)
        return first - started, (new_tokens - 1) / (time.perf_counter() - first)

    return run
