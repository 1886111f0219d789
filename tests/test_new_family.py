"""A family that the package does not have, written as an outsider would: one Family, and a place in the catalogue.

Gemma 3's text model serves, since transformers has it to compare with and it differs from Llama nearly everywhere: two
rotary embeddings, one for layers with a sliding window and one for the others; GELU; four norms a layer, each of 1 plus
its weight; another scale of attention; embeddings multiplied. No file of models/ knows of it.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkv import LLM, FastKV, FastKVError, FullKV
from fastkv.engine.compiled_row import CompiledRow
from fastkv.models import catalogue
from fastkv.models.block import Attention, Block
from fastkv.models.config import ModelConfig
from fastkv.models.family import Family
from fastkv.models.fields import Fields
from fastkv.models.layers import MLP
from fastkv.models.network_config import NetworkConfig
from fastkv.models.rope_config import RopeConfig, read_rope_section
from fastkv.models.weights import checkpoint_tensors
from fastkv.models.windows import layer_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Imported by the tests: it takes seconds, and every process that runs some of all tests imports all of their modules.
if find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

VOCABULARY, STEPS = 97, 4
LOCAL, GLOBAL = 1, 0  # places of the rotary embeddings


class OnePlusNorm(nn.Module):
    """RMS norm by 1 + weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, 1 + self.weight, self.eps)


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


class GemmaBlock(Block):
    """Norms before and after attention, and before and after the MLP."""

    def __init__(self, config: NetworkConfig, layer: int) -> None:
        eps = config.rms_norm_eps
        attention = Attention(
            config,
            q_norm=OnePlusNorm(config.head_dim, eps),
            k_norm=OnePlusNorm(config.head_dim, eps),
            scale=config.family_settings["scale"],
            rotary=GLOBAL if config.windows[layer] is None else LOCAL,
        )
        super().__init__(attention, MLP(config.hidden_size, config.intermediate_size, False, gelu_tanh))
        self.before_attention = OnePlusNorm(config.hidden_size, eps)
        self.after_attention = OnePlusNorm(config.hidden_size, eps)
        self.before_mlp = OnePlusNorm(config.hidden_size, eps)
        self.after_mlp = OnePlusNorm(config.hidden_size, eps)

    def attention_input(self, hidden: Tensor) -> Tensor:
        return self.before_attention(hidden)

    def attention_output(self, attended: Tensor) -> Tensor:
        return self.after_attention(super().attention_output(attended))

    def mlp_output(self, hidden: Tensor) -> Tensor:
        return self.after_mlp(super().mlp_output(self.before_mlp(hidden)))


class Gemma(Family):
    architectures = (("gemma3_text", "Gemma3ForCausalLM"),)
    head_dim = 256
    activations = ("gelu_pytorch_tanh",)
    stored: ClassVar = {
        **Family.stored,
        "before_attention": ("input_layernorm",),
        "after_attention": ("post_attention_layernorm",),
        "before_mlp": ("pre_feedforward_layernorm",),
        "after_mlp": ("post_feedforward_layernorm",),
    }

    def rope(self, fields: Fields, context_length: int) -> RopeConfig:
        return _rope(fields, "full_attention", context_length)

    def differences(self, fields: Fields) -> dict[str, Any]:
        return {
            "sliding_windows": layer_windows(fields, fields.integer("sliding_window")),
            "family_settings": {
                "local": _rope(fields, "sliding_attention", fields.integer("max_position_embeddings")),
                "scale": fields.number("query_pre_attn_scalar") ** -0.5,
            },
        }

    def block(self, config: NetworkConfig, layer: int) -> Block:
        return GemmaBlock(config, layer)

    def rotary_embeddings(self, config: NetworkConfig) -> tuple[RopeConfig, ...]:
        return config.rope, config.family_settings["local"]

    def embedded_(self, config: NetworkConfig, hidden: Tensor) -> Tensor:
        return hidden.mul_(math.sqrt(config.hidden_size))

    def final_norm(self, config: NetworkConfig) -> nn.Module:
        return OnePlusNorm(config.hidden_size, config.rms_norm_eps)


def _rope(fields: Fields, kind: str, context_length: int) -> RopeConfig:
    parameters = fields.section("rope_parameters")
    section = parameters.section(kind) if parameters is not None else None
    if section is None:
        raise fields.complain("rope_parameters", f"an object with {kind}")
    return read_rope_section(section, fields, context_length)


def _reference() -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "gemma3_text",
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=20,
        query_pre_attn_scalar=11,
        max_position_embeddings=4096,
        sliding_window=9,
        layer_types=["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
        },
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    generator = torch.Generator().manual_seed(1234)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / math.sqrt(parameter.shape[1]) if parameter.dim() == 2 else 0.3 * noise)
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    _reference().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def _listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "FAMILIES", (*catalogue.FAMILIES, Gemma()))


def test_without_its_line_in_the_catalogue_it_is_not_supported(folder: Path) -> None:
    with pytest.raises(FastKVError, match="Gemma3ForCausalLM is not supported"):
        LLM(folder, device="cpu")


@pytest.mark.usefixtures("_listed")
def test_it_gives_the_logits_of_transformers(folder: Path) -> None:
    llm = LLM(folder, policy=FullKV(), dtype="float32", device="cpu")
    ids = torch.randint(VOCABULARY, (1, 40 + STEPS), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = _reference()(ids, use_cache=False).logits[:, 39:]
    pre = llm.prefill(ids[:, :40], max_tokens=STEPS)
    steps = [llm.decode(pre.cache, ids[:, 40 + step]) for step in range(STEPS)]
    torch.testing.assert_close(torch.stack([pre.logits, *steps], dim=1), expected, atol=1e-4, rtol=0)


@pytest.mark.usefixtures("_listed")
def test_its_compiled_steps_are_its_plain_ones(folder: Path, stand_in_compiler: list[Any]) -> None:
    """Layers that use one rotary embedding or the other are compiled apart."""
    llm = LLM(folder, policy=FullKV(), dtype="float32", device="cpu")
    ids = torch.randint(VOCABULARY, (1, 40 + STEPS), generator=torch.Generator().manual_seed(3))
    logits = []
    for row in (None, CompiledRow(llm.model, {})):
        llm.model.row = row
        pre = llm.prefill(ids[:, :40], max_tokens=STEPS)
        logits.append([llm.decode(pre.cache, ids[:, 40 + step]) for step in range(STEPS)])
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=0)
    # The first projection, from a global layer to a local one twice, the other way once, and the last layer.
    assert [each.runs for each in stand_in_compiler] == [STEPS, 2 * STEPS, STEPS, STEPS]


@pytest.mark.usefixtures("_listed")
@pytest.mark.parametrize("rotary", [LOCAL, GLOBAL])
def test_each_layer_turns_by_its_own_rotary_embedding(folder: Path, rotary: int) -> None:
    """The comparison above would fail if all layers took the same one."""
    llm = LLM(folder, policy=FullKV(), dtype="float32", device="cpu")
    ids = torch.randint(VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(3))
    before = llm.prefill(ids).logits
    assert [block.self_attn.rotary for block in llm._model.blocks] == [GLOBAL, LOCAL, GLOBAL, LOCAL]
    for block in llm._model.blocks:
        block.self_attn.rotary = rotary
    assert (llm.prefill(ids).logits - before).abs().max() > 0.01


@pytest.mark.usefixtures("_listed")
def test_it_runs_under_a_policy_that_drops_tokens(folder: Path) -> None:
    """Propagated tokens keep their positions in both rotary embeddings; where nothing is dropped, nothing changes."""
    llm = LLM(folder, dtype="float32", device="cpu")
    ids = torch.randint(VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(3))
    kept = FastKV(tsp_layer=1, tsp_len=4, kv_len=4, window=2)
    assert llm.prefill(ids, kept, max_tokens=0).tokens[-1].shape == (1, 4)
    everything = FastKV(tsp_layer=1, tsp_len=9, kv_len=9, window=2)
    torch.testing.assert_close(
        llm.prefill(ids, everything).logits, llm.prefill(ids, FullKV()).logits, atol=1e-5, rtol=1e-5
    )


@pytest.mark.usefixtures("_listed")
def test_its_weights_go_back_under_their_own_names(folder: Path) -> None:
    llm = LLM(folder, dtype="float32", device="cpu")
    stored = {name for name in _reference().state_dict() if name != "lm_head.weight"}  # tied
    assert checkpoint_tensors(llm._model).keys() == stored


@pytest.mark.usefixtures("_listed")
def test_its_config_is_read_by_its_own_rules(folder: Path) -> None:
    config = ModelConfig.from_pretrained(folder)
    assert config.rope == RopeConfig(10_000.0, "linear", 4.0)
    assert config.family_settings == {"local": RopeConfig(100.0), "scale": 11**-0.5}
    assert config.sliding_windows == (None, 9, None, 9)
