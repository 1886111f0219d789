"""What every family's block owes the engine: no operation too many, no break in a compiled graph, one rotation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastkv import FastKVError
from fastkv.models.block import Block
from fastkv.models.config import ModelConfig
from fastkv.models.granite import Multipliers
from fastkv.models.layers import RotaryEmbedding
from fastkv.models.llama import Llama
from fastkv.models.rope_config import RopeConfig
from fastkv.models.weights import random_weights

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Olmo2ForCausalLM",
    "GraniteForCausalLM",
)
HEADS = 8  # query heads, KV heads twice
TOKENS = 9


def network(architecture: str = "LlamaForCausalLM", **changes: Any) -> Llama:
    """Heads of 16: the usual scale of attention is 1/4."""
    settings: dict[str, Any] = {"n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "context_length": 128}
    config = ModelConfig(architecture, 60, 24, 40, **{**settings, **changes})
    model = random_weights(config, torch.float32, torch.device("cpu"))
    model.reserve(100)
    return model


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(1, TOKENS, 24, generator=torch.Generator().manual_seed(1))


class Operations(TorchDispatchMode):
    """Notes the name of every torch operation."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(operator.overloadpacket.__name__)
        return operator(*args, **(kwargs or {}))


@contextmanager
def operations() -> Iterator[list[str]]:
    with torch.inference_mode(), Operations() as mode:
        yield mode.names


# --- operations ---

QKV = "linear unflatten transpose split_with_sizes"
ROTATION = "chunk mul cat addcmul_ split_with_sizes"
OUTPUT = "transpose flatten linear"
MLP = "linear chunk silu mul linear"
NORMS_OF_HEADS = "slice rms_norm slice rms_norm cat"
STEPS = {
    "LlamaForCausalLM": f"rms_norm {QKV} {ROTATION} {OUTPUT} add_ rms_norm {MLP} add_",
    "MistralForCausalLM": f"rms_norm {QKV} {ROTATION} {OUTPUT} add_ rms_norm {MLP} add_",
    "Qwen2ForCausalLM": f"rms_norm {QKV} {ROTATION} {OUTPUT} add_ rms_norm {MLP} add_",
    "Qwen3ForCausalLM": f"rms_norm {QKV} {NORMS_OF_HEADS} {ROTATION} {OUTPUT} add_ rms_norm {MLP} add_",
    # A scale of 1/4 for heads of 16 is the usual one: nothing is done to q.
    "GraniteForCausalLM": f"rms_norm {QKV} {ROTATION} {OUTPUT} mul add_ rms_norm {MLP} mul add_",
}


@pytest.mark.parametrize("architecture", STEPS)
def test_a_decode_step_issues_these_operations_and_no_other(architecture: str) -> None:
    """A small operation more in every layer is a kernel launch more: on a GPU that is what a step's time is made of."""
    settings = {"family_settings": Multipliers(attention=0.25)} if architecture == "GraniteForCausalLM" else {}
    model = network(architecture, **settings)
    rope = model.rope(torch.tensor([[7]]))
    hidden = torch.ones(1, 1, 24)
    with operations() as names:
        q, _, _ = model.blocks[0].project(hidden, rope)
        model.blocks[0].finish_(hidden, q)
    assert " ".join(names) == STEPS[architecture]


def test_a_llama_adds_nothing_to_embedding_and_head() -> None:
    model, ids = network(), torch.tensor([[3]])
    with operations() as names:
        model.head(model.embed(ids))
    assert names == ["embedding", "rms_norm", "linear", "to"]


def test_a_scale_of_attention_is_carried_by_q_alone(hidden: Tensor) -> None:
    """Attention multiplies by 1/4: a family that wants 1/2 has queries twice as long, in whatever way they are made."""
    usual, other = (
        network("GraniteForCausalLM", family_settings=Multipliers(attention=scale)) for scale in (0.25, 0.5)
    )
    with torch.inference_mode():
        for out in (None, torch.empty(1, HEADS, TOKENS, 16)):
            q, k, v = (part.clone() for part in usual.blocks[0].project(hidden, usual.rope_of_range(3, TOKENS), out))
            q2, k2, v2 = other.blocks[0].project(hidden, other.rope_of_range(3, TOKENS), out)
            assert torch.equal(q2, 2 * q)
            assert torch.equal(k2, k)
            assert torch.equal(v2, v)
        alone = other.blocks[0].project_q(hidden, other.rope_of_range(3, TOKENS))
    torch.testing.assert_close(alone, 2 * q, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_way_of_projecting_gives_the_same(architecture: str, hidden: Tensor) -> None:
    model = network(architecture)
    block, rope = model.blocks[1], model.rope_of_range(5, TOKENS)
    out, keys = (torch.empty(1, heads, 2 * TOKENS, 16)[:, :, :TOKENS] for heads in (HEADS, HEADS // 2))
    with torch.inference_mode():
        q, k, v = block.project(hidden, rope)
        block.project(hidden, rope, out)
        block.project_kv(hidden, rope, keys)
        alone = block.project_q(hidden, rope)
    assert torch.equal(out, torch.cat((q, k, v), dim=1))
    torch.testing.assert_close(keys, torch.cat((k, v), dim=1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone, q, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_block_in_steps_is_the_whole_block(architecture: str, hidden: Tensor) -> None:
    """Training takes a block whole, a prefill in steps and in place."""
    model = network(architecture)
    block, rope = model.blocks[0], model.rope_of_range(0, TOKENS)
    with torch.inference_mode():
        whole = block.mlp(block.attention(hidden, rope, lambda q, k, v: q + 1))
        steps = hidden.clone()
        block.finish_(steps, block.project(steps, rope)[0] + 1)
    torch.testing.assert_close(steps, whole)


# --- compiled graphs ---


@pytest.fixture
def explain() -> Iterator[Callable[..., Any]]:
    """torch's own report on how a function would be compiled; nothing is generated, so no compiler is needed."""
    dynamo = pytest.importorskip("torch._dynamo")
    if not dynamo.is_dynamo_supported():
        pytest.skip("torch.compile does not work here")
    yield dynamo.explain
    dynamo.reset()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_block_compiles_into_one_graph(architecture: str, hidden: Tensor, explain: Callable[..., Any]) -> None:
    """`torch.mul(…, out=…)` into the heads of a chunk, which lie apart in memory, once broke every layer's graph."""
    model = network(architecture)
    block, rope = model.blocks[0], model.rope_of_range(0, TOKENS)
    out = torch.empty(1, HEADS, 2 * TOKENS, 16)[:, :, :TOKENS]
    assert not out.is_contiguous()
    with torch.no_grad():
        q, _, _ = block.project(hidden, rope)
        for part, arguments in (
            (Block.project, (block, hidden, rope)),
            (Block.project, (block, hidden, rope, out)),
            (Block.finish_, (block, hidden.clone(), q)),
        ):
            report = explain(part)(*arguments)
            assert report.graph_break_count == 0, report.break_reasons
            assert report.graph_count == 1


# --- rotation ---


def test_a_range_of_positions_is_a_view_of_the_table() -> None:
    model = network()
    first = model.rope_of_range(0, 60)
    later = model.rope_of_range(40, 20)
    assert later.rotations[0].cos.untyped_storage().data_ptr() == first.rotations[0].cos.untyped_storage().data_ptr()
    looked_up = model.rope(torch.arange(40, 60)[None])
    for found in (later, first.at(40, 60)):
        assert torch.equal(found.rotations[0].cos, looked_up.rotations[0].cos)
        assert torch.equal(found.rotations[0].sin, looked_up.rotations[0].sin)


def test_a_range_reserves_its_positions() -> None:
    model = network()
    before = model.rotary.reserved
    rope = model.rope_of_range(before - 1, 2)
    assert model.rotary.reserved > before
    assert rope.rotations[0].cos.shape == (1, 1, 2, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_rotation_into_memory_is_the_rotation(dtype: torch.dtype) -> None:
    """Bit for bit, whether the result is new or written among other heads: prefill and decoding take both."""
    rotary = RotaryEmbedding(RopeConfig(), 16)
    rotary.reserve(TOKENS, dtype)
    x = torch.randn(2, TOKENS, 3, 16, generator=torch.Generator().manual_seed(2)).to(dtype).transpose(1, 2)
    room = torch.full((2, 5, TOKENS, 16), 7.0, dtype=dtype)
    rotation = rotary.range(0, TOKENS)
    assert torch.equal(rotation.rotate(x, out=room[:, :3]), rotation.rotate(x))
    assert torch.equal(room[:, :3], rotation.rotate(x))
    assert (room[:, 3:] == 7).all()
    low, high = x.float().chunk(2, dim=-1)
    angles = torch.arange(TOKENS)[:, None] * rotary.inv_freq
    turned = torch.cat((low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()), dim=-1)
    torch.testing.assert_close(
        rotation.rotate(x).float(), turned, atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=0
    )


# --- the head, families by name ---


def test_the_head_takes_any_leading_shape(hidden: Tensor) -> None:
    for model in (network(), network("GraniteForCausalLM", family_settings=Multipliers(logits=4.0))):
        with torch.inference_mode():
            logits = model.head(hidden)
            last = model.head(hidden[:, -1])
        assert logits.shape == (1, TOKENS, 60)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits[:, -1], last)


def test_an_architecture_that_no_family_has() -> None:
    with pytest.raises(FastKVError, match="GPT2LMHeadModel is not supported; supported are LlamaForCausalLM, "):
        network("GPT2LMHeadModel")
