"""Hugging Face's model on the very weights of an LLM, as one would use it: SDPA attention and its own cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkv import LLM, FastKVError
from fastkv.models.config import ModelConfig
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


def check_peer(config: ModelConfig) -> None:
    """FastKVError for a model that hf_model does not build."""
    if config.architecture != "LlamaForCausalLM":
        raise FastKVError(f"--peer transformers is for Llama models, not {config.architecture}; leave it out")


def transformers_peer(llm: LLM) -> tuple[Callable[[Tensor], Any], Callable[[Any], Any]]:
    """Greedy requests there, as two functions: prompts [B, N] -> a state, and one step: state -> state.

    A state is (tokens int64 [B, 1], the cache). Neither waits for the device.
    """
    model = hf_model(llm)

    def forward(ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        with torch.inference_mode():
            output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return output.logits[:, -1].argmax(-1, keepdim=True), output.past_key_values

    return lambda ids: forward(ids.to(llm.device), None), lambda state: forward(*state)
