"""With a full cache every family gives transformers' logits: prefill, decoding, rotary scalings, windows, checkpoints.

The models are tiny, but their weights are sharper than a fresh initialisation: heads that attend to everything alike
would hide a wrong position, a wrong window or a skipped norm.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from fastkv import LLM, FullKV
from fastkv.models.config import ModelConfig
from fastkv.models.layers import RotaryEmbedding
from fastkv.models.rope_config import RopeConfig
from fastkv.models.rope_frequencies import inverse_frequencies

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Imported by the tests: it takes seconds, and every process that runs some of all tests imports all of their modules.
if find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

VOCABULARY = 97
STEPS = 4  # decode steps after each prefill
TOLERANCE = 1e-4

# No two sizes are equal, so that a swapped one cannot pass.
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

DEFAULT = {"rope_type": "default", "rope_theta": 10_000.0}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 8.0, "original_max_position_embeddings": 64}
ROTARY: dict[str, dict[str, Any]] = {
    "default": DEFAULT,
    "default-theta-500": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "llama3-narrow-band": {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 32.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 2.5,
        "original_max_position_embeddings": 64,
    },
    "llama3-uneven": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1000,
    },
    "yarn": YARN,
    "yarn-attention-factor": {**YARN, "attention_factor": 0.7},
    "yarn-mscales": {**YARN, "mscale": 1.5, "mscale_all_dim": 0.5},
    "yarn-equal-mscales": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    "yarn-mscale-alone": {**YARN, "mscale": 2.0},
    "yarn-not-truncated": {**YARN, "truncate": False},
    "yarn-betas": {**YARN, "beta_fast": 8.0, "beta_slow": 0.5},
    "yarn-factor-implied": {**YARN, "factor": None},
}
# What a scaling must not be told apart from: published code ignores one mscale without the other.
SAME_AS = {"yarn-mscale-alone": "yarn"}


@dataclass(frozen=True)
class Case:
    """One configuration: a model type, what it changes about TINY, and how many tokens its prompt has."""

    name: str
    model_type: str
    changes: dict[str, Any] = field(default_factory=dict)
    n_tokens: int = 40


# Heads of 16, so that a scale of 1/4 is the usual 1 / sqrt(head_dim): the case that leaves queries alone.
ONES: dict[str, Any] = {"head_dim": 16, "attention_multiplier": 0.25}
GRANITE: dict[str, Any] = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
    "tie_word_embeddings": True,
}

CASES = [
    Case("llama-gqa", "llama"),
    Case("llama-mha", "llama", {"num_key_value_heads": 6}),
    Case("llama-mqa", "llama", {"num_key_value_heads": 1}),
    Case("llama-tied", "llama", {"tie_word_embeddings": True}),
    Case("llama-attention-bias", "llama", {"attention_bias": True}),
    Case("llama-mlp-bias", "llama", {"mlp_bias": True}),
    Case("llama-all-biases-tied", "llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    Case("llama-wide-heads", "llama", {"head_dim": 20}),
    Case("llama-narrow-heads", "llama", {"head_dim": 6}),
    Case("llama-one-layer", "llama", {"num_hidden_layers": 1}),
    Case("llama-large-eps", "llama", {"rms_norm_eps": 0.1}),
    Case("llama-one-token-prompt", "llama", n_tokens=1),
    Case("mistral-no-window", "mistral", {"sliding_window": None}),
    Case("mistral-wide-heads-like-nemo", "mistral", {"sliding_window": None, "head_dim": 20}),
    Case("mistral-window", "mistral", {"sliding_window": 9}),
    Case("mistral-window-over-several-query-blocks", "mistral", {"sliding_window": 16}, 1029),
    Case("mistral-window-is-the-prompt", "mistral", {"sliding_window": 40}),
    Case("mistral-window-one-below-the-prompt", "mistral", {"sliding_window": 39}),
    Case("mistral-decoding-crosses-the-window", "mistral", {"sliding_window": 42}),
    Case("mistral-window-of-one", "mistral", {"sliding_window": 1}),
    Case("ministral-window", "ministral", {"sliding_window": 9, "head_dim": 20}),
    Case(
        "ministral-alternating",
        "ministral",
        {
            "sliding_window": 7,
            "head_dim": 20,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    Case("ministral-window-beyond-the-prompt", "ministral", {"sliding_window": 400, "head_dim": 20}),
    Case("qwen2", "qwen2"),
    Case("qwen2-tied", "qwen2", {"tie_word_embeddings": True}),
    Case(
        "qwen2-window-from-layer-1", "qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
    ),
    Case("qwen2-window-everywhere", "qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}),
    Case("qwen2-window-nowhere", "qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3}),
    Case("qwen2-window-switched-off", "qwen2", {"use_sliding_window": False, "sliding_window": 9}),
    Case(
        "qwen2-layer-types",
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    Case("qwen3", "qwen3", {"head_dim": 20}),
    Case("qwen3-attention-bias", "qwen3", {"head_dim": 20, "attention_bias": True}),
    Case("qwen3-tied-mha", "qwen3", {"head_dim": 8, "num_key_value_heads": 6, "tie_word_embeddings": True}),
    Case(
        "qwen3-window-from-layer-2",
        "qwen3",
        {"head_dim": 20, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
    ),
    Case(
        "qwen3-layer-types",
        "qwen3",
        {
            "head_dim": 20,
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    Case("olmo2", "olmo2"),
    Case("olmo2-mha", "olmo2", {"num_key_value_heads": 6}),
    Case("olmo2-mqa", "olmo2", {"num_key_value_heads": 1}),
    Case("olmo2-tied-attention-bias", "olmo2", {"attention_bias": True, "tie_word_embeddings": True}),
    Case("olmo2-large-eps", "olmo2", {"rms_norm_eps": 0.1}),
    Case("olmo2-one-layer", "olmo2", {"num_hidden_layers": 1}),
    Case("olmo2-one-token-prompt", "olmo2", n_tokens=1),
    Case("granite-multipliers-of-one", "granite"),
    Case("granite-like-published", "granite", GRANITE),
    Case(
        "granite-biases-untied",
        "granite",
        {**GRANITE, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    ),
    Case("granite-embedding-multiplier", "granite", {**ONES, "embedding_multiplier": 3.0}),
    Case("granite-attention-multiplier", "granite", {**ONES, "attention_multiplier": 0.7}),
    Case("granite-residual-multiplier", "granite", {**ONES, "residual_multiplier": 0.4}),
    Case("granite-logits-scaling", "granite", {**ONES, "logits_scaling": 5.0}),
    Case("granite-mha-one-token-prompt", "granite", {**GRANITE, "num_key_value_heads": 6}, n_tokens=1),
]


def _named(case: Case) -> str:
    return case.name


def _reference(model_type: str, **changes: Any) -> PreTrainedModel:
    """transformers' model of TINY with `changes`, its weights drawn anew from a fixed seed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **{**TINY, "rope_parameters": dict(DEFAULT), **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    generator = torch.Generator().manual_seed(1234)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                # Scores spread by the square of the gain of queries and keys, so that few tokens carry a head.
                gain = 1.6 if "q_proj" in name or "k_proj" in name else 1.0
                parameter.copy_(noise * gain / math.sqrt(parameter.shape[1]))
            elif "norm" in name:
                sharp = 1.6 if "q_norm" in name or "k_norm" in name else 1.0
                parameter.copy_(sharp + 0.3 * noise)
            else:
                parameter.copy_(0.5 * noise)
    return model.eval()


def _rounded(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its parameters in `dtype`; unlike `model.to`, this leaves the rotary frequencies in float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def _ids(n_tokens: int, batch: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, (batch, n_tokens), generator=torch.Generator().manual_seed(n_tokens))


@torch.no_grad()
def _expected(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits [B, T, V] of every token, without any cache."""
    return model(ids, use_cache=False).logits


def _saved(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def _load(folder: Path, dtype: str = "float32") -> LLM:
    return LLM(folder, policy=FullKV(), dtype=dtype, device="cpu")


def _teacher_forced(llm: LLM, ids: Tensor) -> Tensor:
    """ids [B, N + STEPS] -> logits [B, STEPS + 1, V]: of the prefill of N tokens, then of each decode step."""
    n_tokens = ids.shape[1] - STEPS
    pre = llm.prefill(ids[:, :n_tokens], max_tokens=STEPS)
    steps = [llm.decode(pre.cache, ids[:, n_tokens + step]) for step in range(STEPS)]
    return torch.stack([pre.logits, *steps], dim=1)


def _assert_same_logits(llm: LLM, model: PreTrainedModel, n_tokens: int, batch: int = 1) -> None:
    ids = _ids(n_tokens + STEPS, batch)
    torch.testing.assert_close(
        _teacher_forced(llm, ids), _expected(model, ids)[:, n_tokens - 1 :], atol=TOLERANCE, rtol=0
    )


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models of this size only lose by sharing their work out, most of all on a machine that is busy otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- every family ---


@pytest.mark.parametrize("case", CASES, ids=_named)
def test_prefill_and_decode_give_the_logits_of_transformers(case: Case, tmp_path: Path) -> None:
    model = _reference(case.model_type, **case.changes)
    _assert_same_logits(_load(_saved(model, tmp_path)), model, case.n_tokens)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.changes.get("sliding_window") and case.n_tokens >= 40], ids=_named
)
def test_the_reference_really_slides_its_window(case: Case) -> None:
    """The comparisons above say nothing about windows unless the reference's own masks are at work."""
    windowed = _reference(case.model_type, **case.changes)
    types = getattr(windowed.config, "layer_types", None) or ["sliding_attention"] * TINY["num_hidden_layers"]
    window = windowed.config.sliding_window
    active = window is not None and window < case.n_tokens + STEPS and "sliding_attention" in types
    ids = _ids(case.n_tokens + STEPS)
    with_window = _expected(windowed, ids)
    windowed.config.sliding_window = 10**6
    changed = (with_window - _expected(windowed, ids))[0, case.n_tokens - 1 :].abs().amax(dim=-1)  # of each step
    assert bool((changed[-1] > 100 * TOLERANCE) == active)
    if case.name == "mistral-decoding-crosses-the-window":
        # 40 tokens, then 2 more, fit into 42: only what comes after them sees less.
        assert (changed[:3] == 0).all()
        assert (changed[3:] > 100 * TOLERANCE).all()


def test_weights_are_sharp_enough_to_tell_configurations_apart() -> None:
    """Attention is far from uniform: the entropy of its rows is well below that of an even spread."""
    model = _reference("llama")
    with torch.no_grad():
        attentions = model(_ids(64), output_attentions=True).attentions
    row = torch.stack([layer[0, :, -1] for layer in attentions])  # [L, Hq, T]
    entropy = -(row * row.clamp_min(1e-30).log()).sum(dim=-1).mean()
    assert entropy < 0.75 * math.log(64)


# --- rotary scalings ---


def _rotary_reference(name: str, model_type: str = "llama", **changes: Any) -> PreTrainedModel:
    """Heads of 32: enough pairs for every scaling to keep some, to blend some and to stretch some."""
    return _reference(model_type, **{"rope_parameters": dict(ROTARY[name]), "head_dim": 32, **changes})


@pytest.fixture(scope="module")
def rotary_logits() -> dict[str, Tensor]:
    """Reference logits of one prompt under every scaling, the weights being the same."""
    return {name: _expected(_rotary_reference(name), _ids(300)) for name in ROTARY}


@pytest.mark.parametrize("name", ROTARY)
def test_rotary_scaling(name: str, tmp_path: Path) -> None:
    """300 tokens are several times the original lengths (64, 128) that the scalings stretch."""
    model = _rotary_reference(name)
    _assert_same_logits(_load(_saved(model, tmp_path)), model, 300)


@pytest.mark.parametrize("name", [name for name in ROTARY if name not in SAME_AS])
def test_rotary_scalings_differ_from_one_another(name: str, rotary_logits: dict[str, Tensor]) -> None:
    """Each comparison above would fail if any other scaling of the list were taken in its place."""
    for other, logits in rotary_logits.items():
        if name not in (other, SAME_AS.get(other)):
            assert (rotary_logits[name] - logits)[0, -1].abs().max() > 100 * TOLERANCE, other


@pytest.mark.parametrize("model_type", ["mistral", "ministral", "qwen2", "qwen3", "olmo2", "granite"])
@pytest.mark.parametrize("name", ["llama3", "yarn-betas"])
def test_rotary_scaling_of_the_other_families(model_type: str, name: str, tmp_path: Path) -> None:
    model = _rotary_reference(name, model_type, sliding_window=400)
    _assert_same_logits(_load(_saved(model, tmp_path)), model, 150)


@pytest.mark.parametrize("name", ["default", "llama3", "yarn"])
def test_a_long_prompt(name: str, tmp_path: Path) -> None:
    model = _rotary_reference(name, num_hidden_layers=2)
    _assert_same_logits(_load(_saved(model, tmp_path)), model, 2500)


@pytest.mark.parametrize("name", ROTARY)
def test_rotation_of_positions_up_to_the_end_of_a_long_context(name: str, tmp_path: Path) -> None:
    """Frequencies may differ by two units in the last place: position 131 071 makes 131 071 errors of each one.

    Another order of the same sums and products is enough to lose more, and to disagree with the reference at the far
    end of a long prompt.
    """
    model = _rotary_reference(name, head_dim=64, max_position_embeddings=131_072)
    model.config.save_pretrained(tmp_path)
    rotary = RotaryEmbedding(ModelConfig.from_pretrained(tmp_path).rope, 64)
    theirs = model.model.rotary_emb
    assert rotary.scale == pytest.approx(theirs.attention_scaling, rel=1e-6)
    torch.testing.assert_close(rotary.inv_freq, theirs.inv_freq, rtol=2**-22, atol=0)

    positions = torch.tensor([[0, 1, 4095, 8192, 32_767, 65_535, 131_071]])
    cos, sin = theirs(torch.zeros(1), positions)  # [1, T, D] each, the pairs twice
    rotary.reserve(131_072, torch.float32)
    rope = rotary(positions)
    # An angle is off by at most position * frequency * 2**-22, and a cosine by no more than its angle.
    allowed = (positions[0, :, None] * theirs.inv_freq * 2**-22 + 1e-6) * theirs.attention_scaling
    assert ((rope.cos[0, 0] - cos[0]).abs() <= allowed.repeat(1, 2)).all()
    signs = torch.tensor([-1.0, 1.0]).repeat_interleave(32)
    assert ((rope.sin[0, 0] * signs - sin[0]).abs() <= allowed.repeat(1, 2)).all()


def test_llama3_frequencies_keep_the_fast_and_divide_the_slow() -> None:
    """Llama 3.1's own settings: a wavelength under 2048 is kept, one over 8192 is eight times as long."""
    config = RopeConfig(500_000.0, "llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    plain = inverse_frequencies(RopeConfig(500_000.0), 128)
    ratio = inverse_frequencies(config, 128) / plain
    wavelength = 2 * math.pi / plain
    assert (ratio[wavelength < 2048] == 1).all()
    torch.testing.assert_close(ratio[wavelength > 8192] * 8, torch.ones(int((wavelength > 8192).sum())))
    between = ratio[(wavelength >= 2048) & (wavelength <= 8192)]
    assert len(between) > 2
    assert ((between > 1 / 8) & (between < 1)).all()
    assert (between.diff() < 0).all()


def test_bfloat16_rotations_are_computed_in_float32() -> None:
    """bfloat16 has no odd positions beyond 256: rounding them before the cosine would merge neighbours."""
    rotary, exact = RotaryEmbedding(RopeConfig(), 64), RotaryEmbedding(RopeConfig(), 64)
    rotary.reserve(100_002, torch.bfloat16)
    exact.reserve(100_002, torch.float32)
    positions = torch.tensor([[1000, 1001, 100_001]])
    rope = rotary(positions)
    torch.testing.assert_close(rope.cos, exact(positions).cos.bfloat16(), rtol=0, atol=0)
    assert rope.cos.dtype == torch.bfloat16
    assert (rope.cos[0, 0, 0] - rope.cos[0, 0, 1]).abs().max() > 0.1


# --- config.json in the old style ---

OLD_STYLE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-default": ("llama", {}),
    "llama-linear": ("llama", {"rope_parameters": ROTARY["linear"]}),
    "llama-llama3": ("llama", {"rope_parameters": ROTARY["llama3"], "tie_word_embeddings": True}),
    "mistral-window": ("mistral", {"sliding_window": 9, "rope_parameters": ROTARY["default-theta-500"]}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": ROTARY["yarn"]}),
    "qwen3-yarn": ("qwen3", {"rope_parameters": ROTARY["yarn-mscales"], "head_dim": 20}),
}


def _rewrite_in_the_old_style(folder: Path, type_key: str) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    rope = values.pop("rope_parameters")
    kind = rope.pop("rope_type")
    values["rope_theta"] = rope.pop("rope_theta")
    values["rope_scaling"] = None if kind == "default" else {type_key: kind, **rope}
    values["torch_dtype"] = values.pop("dtype")
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("type_key", ["type", "rope_type"])
@pytest.mark.parametrize("name", OLD_STYLE)
def test_old_style_config_reads_as_the_new_style(name: str, type_key: str, tmp_path: Path) -> None:
    model_type, changes = OLD_STYLE[name]
    _reference(model_type, **changes).config.save_pretrained(tmp_path)
    # A bare configuration carries no dtype; a saved model's does.
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "bfloat16"}))
    new = ModelConfig.from_pretrained(tmp_path)
    _rewrite_in_the_old_style(tmp_path, type_key)
    old = ModelConfig.from_pretrained(tmp_path)
    assert old == new
    assert old.dtype == "bfloat16"
    assert old.rope.scaling == changes.get("rope_parameters", DEFAULT)["rope_type"]


def test_old_style_checkpoint_gives_the_same_logits(tmp_path: Path) -> None:
    model = _reference("llama", rope_parameters=dict(ROTARY["yarn"]))
    _saved(model, tmp_path)
    _rewrite_in_the_old_style(tmp_path, "type")
    _assert_same_logits(_load(tmp_path), model, 200)


# --- what config.json leaves out ---

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Sizes that the defaults (up to 32 KV heads) fit.
SPARSE = dict(zip(REQUIRED, (VOCABULARY, 64, 80, 30, 32), strict=True))
LLAMA3 = {key: value for key, value in ROTARY["llama3"].items() if key != "rope_theta"}
OUR_NAMES = {
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
}
SILENT_FAMILIES = ("llama", "mistral", "ministral", "qwen2", "qwen3", "olmo2", "granite")
SILENT: dict[str, tuple[str, dict[str, Any]]] = {
    **{model_type: (model_type, {}) for model_type in SILENT_FAMILIES},
    "mistral-null-window": ("mistral", {"sliding_window": None}),
    "ministral-null-window": ("ministral", {"sliding_window": None}),
    "olmo2-null-kv-heads": ("olmo2", {"num_key_value_heads": None}),
    "granite-null-kv-heads": ("granite", {"num_key_value_heads": None}),
    "llama-null-kv-heads": ("llama", {"num_key_value_heads": None}),
    "qwen2-null-kv-heads": ("qwen2", {"num_key_value_heads": None, "num_attention_heads": 16}),
    "qwen3-null-kv-heads": ("qwen3", {"num_key_value_heads": None, "num_attention_heads": 16}),
    "llama-null-head-dim": ("llama", {"head_dim": None}),
    "mistral-null-head-dim": ("mistral", {"head_dim": None}),
    "qwen2-window-by-default": ("qwen2", {"use_sliding_window": True}),
    "qwen2-null-window-switched-on": ("qwen2", {"use_sliding_window": True, "sliding_window": None}),
    "qwen3-null-window-switched-on": ("qwen3", {"use_sliding_window": True, "sliding_window": None}),
    "qwen3-window-by-default": ("qwen3", {"use_sliding_window": True}),
    "mistral-with-layer-types": (
        "mistral",
        {"layer_types": ["full_attention", "sliding_attention"] * 15, "sliding_window": 9, "head_dim": 2},
    ),
    "theta-alone": ("llama", {"rope_theta": 5e5}),
    "theta-beside-parameters": ("llama", {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}}),
    "theta-beside-and-inside": (
        "llama",
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 7e4}},
    ),
    "null-scaling": ("llama", {"rope_theta": 5e5, "rope_scaling": None}),
    "empty-scaling": ("llama", {"rope_theta": 5e5, "rope_scaling": {}}),
    "empty-parameters-beside-scaling": ("llama", {"rope_theta": 5e5, "rope_parameters": {}, "rope_scaling": LLAMA3}),
    "parameters-beside-scaling": (
        "llama",
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}, "rope_scaling": LLAMA3},
    ),
    "original-length-beside": ("llama", {"original_max_position_embeddings": 77, "rope_scaling": LLAMA3}),
    "yarn-original-length-missing": (
        "llama",
        {"max_position_embeddings": 512, "rope_scaling": {"rope_type": "yarn", "factor": 1.0}},
    ),
}


@pytest.mark.parametrize("name", SILENT)
def test_where_config_json_is_silent_it_means_what_transformers_assumes(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    model_type, stated = SILENT[name]
    architecture = f"{model_type.capitalize()}ForCausalLM"
    values = {"architectures": [architecture], "model_type": model_type, **SPARSE, **stated}
    (tmp_path / "config.json").write_text(json.dumps(values))
    theirs = AutoConfig.from_pretrained(tmp_path)
    theirs.standardize_rope_params()  # as a model does once more before it computes its frequencies
    ours = ModelConfig.from_pretrained(tmp_path)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert {key: getattr(ours, our_name) for key, our_name in OUR_NAMES.items()} == {
        key: head_dim if key == "head_dim" else getattr(theirs, key) for key in OUR_NAMES
    }
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.rope.scaling == theirs.rope_parameters["rope_type"]
    assert ours.rope.original_context == theirs.rope_parameters.get("original_max_position_embeddings", 0)
    uniform = "sliding_attention" if model_type == "mistral" else "full_attention"
    types = getattr(theirs, "layer_types", None) or [uniform] * theirs.num_hidden_layers
    window = getattr(theirs, "sliding_window", None)
    assert [ours.windows[layer] for layer in range(ours.n_layers)] == [
        window if kind == "sliding_attention" else None for kind in types
    ]


# --- the same weights, stored otherwise ---


def test_sharded_checkpoint_gives_the_logits_of_a_single_file(tmp_path: Path) -> None:
    model = _reference("qwen2", tie_word_embeddings=False)
    single = _load(_saved(model, tmp_path / "single"))
    sharded_folder = _saved(model, tmp_path / "sharded", max_shard_size="20KB")
    shards = list(sharded_folder.glob("model-*-of-*.safetensors"))
    assert len(shards) > 3
    assert not (sharded_folder / "model.safetensors").exists()
    ids = _ids(30 + STEPS)
    found, wanted = _teacher_forced(_load(sharded_folder), ids), _teacher_forced(single, ids)
    # Not bit for bit: where a tensor begins in its file decides how the CPU's kernels group its sums.
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_shards_cut_through_fused_parameters(tmp_path: Path) -> None:
    """q, k and v of one layer may lie in different files: with 4 KB a shard nearly every tensor has its own."""
    model = _reference("llama", attention_bias=True)
    folder = _saved(model, tmp_path, max_shard_size="4KB")
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    homes = {weight_map[f"model.layers.0.self_attn.{piece}_proj.weight"] for piece in "qkv"}
    assert len(homes) > 1
    _assert_same_logits(_load(folder), model, 30)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        pytest.param("llama", {}, id="llama"),
        pytest.param("mistral", {"sliding_window": 9}, id="mistral-window"),
        pytest.param("qwen3", {"head_dim": 20}, id="qwen3"),
        pytest.param("olmo2", {}, id="olmo2"),
        pytest.param("granite", GRANITE, id="granite"),
    ],
)
def test_a_batch_gives_each_prompt_its_own_logits(model_type: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = _reference(model_type, **changes)
    llm = _load(_saved(model, tmp_path))
    ids = _ids(30 + STEPS, batch=2)
    together = _teacher_forced(llm, ids)
    alone = torch.cat([_teacher_forced(llm, one[None]) for one in ids])
    torch.testing.assert_close(together, alone, atol=TOLERANCE / 2, rtol=0)
    torch.testing.assert_close(together, _expected(model, ids)[:, 29:], atol=TOLERANCE, rtol=0)
    assert (together[0] - together[1]).abs().max() > 1


# --- half precision ---


def _relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "olmo2", "granite"])
def test_half_precision_stays_as_near_to_float32_as_the_reference(model_type: str, dtype: str, tmp_path: Path) -> None:
    """Rounding of weights and activations moves the logits; ours may move by at most half as much again as theirs.

    Both round at the same places (weights, each layer's activations), only in another order, so the errors are of one
    size, far from both zero (the model did compute in `dtype`) and the logits themselves.
    """
    model = _reference(model_type, sliding_window=None)
    ids = _ids(60 + STEPS)
    exact = _expected(model, ids)[:, 59:]
    half = _rounded(model, getattr(torch, dtype))
    theirs = _relative_error(_expected(half, ids)[:, 59:], exact)
    llm = _load(_saved(half, tmp_path), dtype)
    assert str(llm.dtype) == f"torch.{dtype}"
    logits = _teacher_forced(llm, ids)
    assert logits.dtype == torch.float32
    assert theirs / 3 < _relative_error(logits, exact) < 1.5 * theirs


def test_a_bfloat16_checkpoint_computes_in_float32_where_asked(tmp_path: Path) -> None:
    """The rounding of the weights remains; nothing else is rounded."""
    model = _rounded(_reference("llama"), torch.bfloat16)
    llm = _load(_saved(model, tmp_path), "float32")
    assert llm.dtype == torch.float32
    assert llm.config.dtype == "bfloat16"
    _assert_same_logits(llm, _rounded(model, torch.float32), 40)


def test_a_float32_checkpoint_computes_in_bfloat16_where_asked(tmp_path: Path) -> None:
    model = _reference("llama")
    single = _load(_saved(model, tmp_path / "wide"), "bfloat16")
    stored = _load(_saved(_rounded(model, torch.bfloat16), tmp_path / "narrow"), "bfloat16")
    ids = _ids(30 + STEPS)
    assert torch.equal(_teacher_forced(single, ids), _teacher_forced(stored, ids))


def test_parameters_carry_no_gradients(tmp_path: Path) -> None:
    llm = _load(_saved(_reference("qwen3", head_dim=20, tie_word_embeddings=True), tmp_path))
    network: nn.Module = llm._model
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not network.training
    assert not any(parameter.is_meta for parameter in network.parameters())
    assert not any(buffer.is_meta for buffer in network.buffers())
