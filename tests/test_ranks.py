"""A model that two ranks share answers as one process does: every policy and family, batches, sessions; refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from checkpoints import TINY, shapes, tensors_of, write, write_config
from rank_threads import Shared, on_ranks, this_rank
from safetensors import safe_open
from test_reference import BUNDLED, MODELS, settings
from torch import Tensor

from fastkv import ASL, LLM, AdaKV, Compactor, DefensiveKV, FastKV, FastKVError, FullKV, ReSTKV, SamplingParams, SnapKV
from fastkv.cache.catalogue import POLICIES
from fastkv.cache.policy import Observation, Policy
from fastkv.console.ranks import check_alike
from fastkv.engine import batch as batch_module
from fastkv.engine.graph import GraphError
from fastkv.engine.prefill import Prefill
from fastkv.errors import FaultError
from fastkv.kernels import ranks as ranks_module
from fastkv.kernels.ranks import ProcessRanks, Ranks, check_started
from fastkv.models.config import ModelConfig
from fastkv.models.split import part_of
from fastkv.models.weights import checkpoint_tensors

TABLE = [[1.0, 3.0], [2.0, 1.0], [5.0, 1.0], [1.0, 1.0], [1.0, 4.0], [2.0, 2.0]]
NEEDED: dict[str, dict[str, Any]] = {"headkv": {"head_scores": TABLE}}
# What else works something out of several heads.
MORE: list[Policy] = [
    FastKV(min_tokens=8, keep_mass=0.5),
    FastKV(min_tokens=8, lookahead=4, tsp_layer=(1, 3), tsp_rate=(0.5, 0.3)),
    AdaKV(min_tokens=8, keep_mass=0.5),
    SnapKV(min_tokens=8, keep_mass=0.5, keep_mass_by="head"),
    ASL(min_tokens=8, reading="code", first_layer=1, tau=5.0),
    Compactor(min_tokens=16, budgets="heads"),
    DefensiveKV(min_tokens=16, certain_mass=0.0),
]


def small(policy: type[Policy]) -> Policy:
    """A policy that drops most of a short prompt."""
    fields = {field.name for field in dataclasses.fields(policy) if field.init}
    wanted = {"min_tokens": 16, "read_retention": 0.2, **NEEDED.get(policy.name, {})}
    if policy.name == "quest":
        wanted["page"] = 4
    return policy(**{name: value for name, value in wanted.items() if name in fields})


@pytest.fixture(scope="module")
def shared(tiny_folder: Path) -> Shared:
    return Shared(tiny_folder)


def prompt(n_tokens: int = 200, seed: int = 3, top: int = 256) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, top, (n_tokens,), generator=generator).tolist()


def joined(kept: list[Tensor]) -> list[list[int]]:
    """The positions that each head keeps, over all ranks: [heads] of what [1, Hkv, n] of each rank holds."""
    return [sorted(set(row.tolist()) - {-1}) for of_rank in kept for row in of_rank[0]]


@pytest.mark.parametrize("policy", [*map(small, POLICIES.values()), *MORE], ids=lambda policy: policy.name)
def test_every_policy_chooses_what_one_process_chooses(policy: Policy, tiny_llm: LLM, shared: Shared) -> None:
    ids, params = prompt(), SamplingParams(max_tokens=6, ignore_eos=True)
    whole = tiny_llm.prefill(ids, policy, max_tokens=4)

    def work(llm: LLM) -> tuple[Prefill, list[int], float | None]:
        output = llm.generate(ids, params, policy)
        return llm.prefill(ids, policy, max_tokens=4), output.token_ids, output.metrics.attention_kept

    found = shared.run(work)
    answer = tiny_llm.generate(ids, params, policy)
    for part, tokens, mass in found:
        torch.testing.assert_close(part.logits, whole.logits, atol=1e-4, rtol=0)
        assert all(torch.equal(one, other) for one, other in zip(part.tokens, whole.tokens, strict=True))
        assert tokens == answer.token_ids
        assert mass == pytest.approx(answer.metrics.attention_kept, abs=1e-4)
    for layer, kept in enumerate(whole.kept):
        assert joined([part.kept[layer] for part, _, _ in found]) == joined([kept])


def test_a_drift_is_that_of_all_heads() -> None:
    """Between tokens 10 and 7000 in one head, and in the other one from 100 back to 40."""
    attention = torch.zeros(1, 2, 1, 4, 9000)
    for head, (before, after) in enumerate(((10, 7000), (100, 40))):
        attention[0, head, 0, :2, before], attention[0, head, 0, 2:, after] = 1, 1

    def drifts(heads: Ranks | None, own: Tensor) -> list[float]:
        return ReSTKV(kv_len=9)._drifts(Observation(0, *[own] * 3, heads=heads), own)

    found = on_ranks(2, lambda: drifts(this_rank(), attention[:, this_rank().rank : this_rank().rank + 1]))
    assert found == [drifts(None, attention)] * 2 == [[(6990 - 60) / 2]] * 2


def test_a_rank_holds_its_own_heads_alone(tiny_llm: LLM, shared: Shared) -> None:
    ids = prompt()
    whole = tiny_llm.prefill(ids, FullKV(), max_tokens=4).cache
    for part in shared.run(lambda llm: llm.prefill(ids, FullKV(), max_tokens=4).cache):
        assert part.nbytes * 2 == whole.nbytes
        assert part.entries * 2 == whole.entries


@dataclass(frozen=True, kw_only=True)
class Lopsided(SnapKV):
    """One head wins all that can be won."""

    name: ClassVar[str] = "lopsided"
    per_head = True
    splits_heads: ClassVar[bool] = True

    def head_budgets(self, layer: int, n_layers: int, count: int, scores: Tensor) -> Tensor:
        n_heads = scores.shape[1]
        counts = torch.full(scores.shape[:2], self.window)
        counts[:, 0] += n_heads * (count - self.window)
        return counts


def test_one_rank_may_win_what_all_have_together(tiny_llm: LLM, shared: Shared) -> None:
    policy = Lopsided(kv_len=60, min_tokens=8)
    ids = prompt()
    kept = [part.kept for part in shared.run(lambda llm: llm.prefill(ids, policy, max_tokens=4))]
    assert [part[0].shape[2] for part in kept] == [60 + 52, 8]
    for layer, of_one in enumerate(tiny_llm.prefill(ids, policy, max_tokens=4).kept):
        assert joined([part[layer] for part in kept]) == joined([of_one])


@pytest.mark.parametrize("path", [path for path in BUNDLED if "t3000" not in path.stem], ids=lambda path: path.stem)
def test_the_papers_implementation_is_matched(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        stated = file.metadata()
        expected = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    policy, count = FastKV.paper(**settings(stated)), len(expected["tokens"])
    both = Shared(MODELS[stated["model"]])

    def work(llm: LLM) -> tuple[Prefill, list[int]]:
        pre = llm.prefill(expected["prompt"].tolist(), policy, max_tokens=count)
        logits, tokens = pre.logits, []
        for step, reference in enumerate(expected["logits"]):
            torch.testing.assert_close(logits[0], reference, atol=1e-3, rtol=0)
            tokens.append(int(logits.argmax()))
            if step + 1 < count:
                logits = llm.decode(pre.cache, torch.tensor(tokens[-1:]))
        return pre, tokens

    found = both.run(work)
    for pre, tokens in found:
        assert torch.equal(pre.tokens[-1][0], expected["tsp"].long())
        assert tokens == expected["tokens"].tolist()
    for layer in range(len(found[0][0].kept)):
        kept = torch.cat([pre.kept[layer][0] for pre, _ in found])
        assert torch.equal(kept, expected[f"kept.{layer}"].long())


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "vocab_size": 61},  # 31 and 30 tokens
    "llama tied": {"tie_word_embeddings": True},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 24},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "attention_bias": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "olmo2": {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"},
    "granite": {
        "architectures": ["GraniteForCausalLM"],
        "model_type": "granite",
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.0,
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_shared(family: str, tmp_path: Path) -> None:
    values = TINY | FAMILIES[family]
    folder = write(tmp_path, tensors_of(values), values)
    one, both = LLM(folder, dtype="float32", device="cpu"), Shared(folder)
    ids, policy = prompt(40, top=60), FullKV() if family == "mistral" else FastKV(min_tokens=8, tsp_layer=0)
    wanted = one.prefill(ids, policy, max_tokens=3)
    then = one.decode(wanted.cache, torch.tensor([7]))

    def work(llm: LLM) -> tuple[Tensor, Tensor]:
        pre = llm.prefill(ids, policy, max_tokens=3)
        return pre.logits, llm.decode(pre.cache, torch.tensor([7]))

    for logits, later in both.run(work):
        torch.testing.assert_close(logits, wanted.logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(later, then, atol=1e-4, rtol=1e-4)


def test_ranks_read_their_parts_and_no_more(tmp_path: Path) -> None:
    values = TINY | {"vocab_size": 61}
    folder = write(tmp_path, tensors_of(values), values)
    whole = LLM(folder, dtype="float32", device="cpu").model
    both = [llm.model for llm in Shared(folder).llms]
    for name, parameter in whole.named_parameters():
        parts = [dict(model.named_parameters())[name] for model in both]
        if parts[0].shape == parameter.shape:
            assert all(torch.equal(part, parameter) for part in parts), name
        else:
            assert sum(part.numel() for part in parts) == parameter.numel(), name
    stored = [checkpoint_tensors(model) for model in both]
    for name, shape in shapes(values).items():
        dims = [dim for dim, size in enumerate(shape) if stored[0][name].shape[dim] != size]
        pieces = [each[name] for each in stored]
        found = torch.cat(pieces, dim=dims[0]) if dims else pieces[0]
        assert torch.equal(found, checkpoint_tensors(whole)[name]), name


@pytest.mark.parametrize("weights", [None, "int8"])
def test_random_weights_are_those_of_one_process(weights: str | None, tmp_path: Path) -> None:
    folder = write_config(tmp_path, TINY | {"hidden_size": 32})
    settings: dict[str, Any] = {"load_format": "dummy", "dtype": "float32", "weights": weights}
    one, both = LLM(folder, device="cpu", **settings), Shared(folder, **settings)
    ids = prompt(30, top=60)
    wanted = one.prefill(ids, FullKV()).logits
    for logits in both.run(lambda llm: llm.prefill(ids, FullKV()).logits):  # int8: a part of a row has its own scale
        torch.testing.assert_close(logits, wanted, atol=1e-4 if weights is None else 0.1, rtol=0)


def test_requests_of_every_kind(tiny_llm: LLM, shared: Shared) -> None:
    """Batches that begin alike, sessions, a decode budget, packed entries, and drawn tokens."""
    first, params = prompt(120), SamplingParams(max_tokens=5, ignore_eos=True)
    prompts = [first + prompt(20, seed) for seed in range(3)]

    def work(llm: LLM) -> list[list[int]]:
        found = [each.token_ids for each in llm.generate(prompts, params, FullKV(), batch_size=2)]
        session = llm.session(SnapKV(min_tokens=16))
        found += [llm.generate(session.turn(ids), params).token_ids for ids in (first, prompt(30, 9))]
        found.append(llm.generate(first, params, decode_budget=32).token_ids)
        found.append(llm.generate(first, dataclasses.replace(params, temperature=1.0, seed=5)).token_ids)
        llm.kv_dtype = "int8"
        found.append(llm.generate(first, params).token_ids)
        llm.kv_dtype = None
        return found

    wanted = work(tiny_llm)
    assert shared.run(work) == [wanted, wanted]


@pytest.mark.parametrize(
    "policy", [AdaKV(min_tokens=8), AdaKV(min_tokens=8, keep_mass=0.5), SnapKV(min_tokens=8, keep_mass=0.5)], ids=str
)
def test_prompts_of_one_tensor(policy: Policy, tiny_llm: LLM, shared: Shared) -> None:
    """Of which the heads of a rank keep different numbers together."""
    ids = torch.tensor([prompt(200, 1), prompt(200, 2)])
    whole = tiny_llm.prefill(ids, policy, max_tokens=2)
    for part in shared.run(lambda llm: llm.prefill(ids, policy, max_tokens=2)):
        torch.testing.assert_close(part.logits, whole.logits, atol=1e-4, rtol=0)


def test_sessions_take_as_much_on_all_ranks(tiny_llm: LLM, shared: Shared) -> None:
    """Though the heads of one hold more entries than those of another: a graph is captured by capacities."""
    params = SamplingParams(max_tokens=4, ignore_eos=True)

    def work(llm: LLM) -> tuple[list[list[int]], tuple[int, ...]]:
        session = llm.session(AdaKV(min_tokens=24, head_floor=0.0))
        answers = [llm.generate(session.turn(prompt(n, n)), params).token_ids for n in (150, 40, 40)]
        request = llm._request(session.turn(prompt(40, 1)), params, None)
        return answers, request.plan.capacities

    (one, mine), (other, its) = shared.run(work)
    assert one == other == work(tiny_llm)[0]
    assert mine == its


def test_ranks_compute_in_the_dtype_of_the_first(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faster = [torch.bfloat16, torch.float32]
    monkeypatch.setattr("fastkv.engine.loaded.resolve_dtype", lambda *_: faster[this_rank().rank])
    assert [llm.dtype for llm in Shared(tiny_folder).llms] == [torch.bfloat16] * 2


def test_a_step_that_one_rank_cannot_capture_ends_all(shared: Shared) -> None:
    runtime = shared.llms[1]._runtime
    with pytest.raises(FaultError, match="switch graphs off on all ranks"):
        runtime.eagerly(None, GraphError("no"))  # type: ignore[arg-type]


def test_ranks_that_are_asked_different_things_are_told() -> None:
    device = torch.device("cpu")
    on_ranks(2, lambda: check_alike(this_rank(), device, ["the same", FastKV()]))
    with pytest.raises(FastKVError, match="rank 1 has read other prompts or settings than rank 0"):
        on_ranks(2, lambda: check_alike(this_rank(), device, [this_rank().rank]))


def test_what_is_drawn_without_a_seed_is_the_same_on_all_ranks(shared: Shared) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=3.0)
    drawn = [shared.run(lambda llm: llm.generate(prompt(), params).token_ids) for _ in range(2)]
    assert drawn[0][0] == drawn[0][1]
    assert drawn[0] != drawn[1]


def test_ranks_with_different_memory_decide_alike(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = iter(range(1000))
    monkeypatch.setattr("fastkv.engine.memory.available_bytes", lambda device: 2**40 if next(asked) % 2 else 2**10)
    ids = prompt()

    def refused(llm: LLM) -> str:
        with pytest.raises(FastKVError) as error:
            llm.generate(ids, SamplingParams(max_tokens=2))
        return str(error.value)

    told = sorted(shared.run(refused), key=len)
    assert "needs more memory than another rank has" in told[0]
    assert "MiB of memory" in told[1]


def test_ranks_with_different_memory_take_as_many_slots(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = batch_module.slots_there

    def watched(runtime: Any, *rest: Any) -> int:
        monkeypatch.setattr(batch_module, "available_bytes", lambda device: 2**40 if this_rank().rank else 3 * 2**17)
        seen.append(real(runtime, *rest))
        return seen[-1]

    monkeypatch.setattr(batch_module, "slots_there", watched)
    params = SamplingParams(max_tokens=2, ignore_eos=True)

    def work(llm: LLM) -> None:
        llm.free_buffers()
        llm.generate([prompt(60, i) for i in range(6)], params, FullKV(), batch_size=6)

    shared.run(work)
    assert seen[0] == seen[1] < 6


def test_texts_reach_all_ranks() -> None:
    device = torch.device("cpu")

    def work() -> list[str]:
        ranks = this_rank()
        return [ranks.text(text if ranks.rank == 0 else "", device) for text in ("ä\ud800b", "", "x" * 300)]

    assert on_ranks(3, work) == [["ä\ud800b", "", "x" * 300]] * 3


# --- refusals ---


@pytest.mark.parametrize(
    ("values", "count", "told"),
    [
        ({"num_attention_heads": 9, "num_key_value_heads": 3}, 2, "2 ranks cannot share 3 KV heads.*take one process"),
        ({"num_attention_heads": 8, "num_key_value_heads": 4}, 3, "3 ranks cannot share 4 KV heads.*take 2 or 4"),
        ({"intermediate_size": 41}, 2, "2 ranks cannot share 41 MLP columns"),
        ({"vocab_size": 5, "num_attention_heads": 4, "num_key_value_heads": 4}, 4, "too many for 5 tokens"),
    ],
)
def test_what_cannot_be_shared_is_refused(values: dict[str, Any], count: int, told: str, tmp_path: Path) -> None:
    config = ModelConfig.from_pretrained(write_config(tmp_path, TINY | values))
    with pytest.raises(FastKVError, match=told):
        part_of(config, count - 1, count)


@pytest.mark.parametrize(
    "setting", [{"compile": True}, {"prefix_cache": 2**20}, {"draft_weights": "int8"}, {"offload": True}]
)
def test_settings_of_one_process_are_refused(setting: dict[str, Any], tiny_folder: Path) -> None:
    with pytest.raises(FastKVError, match=f"{next(iter(setting))} does not go with tensor_parallel"):
        Shared(tiny_folder, **setting)


@pytest.mark.parametrize(
    "work",
    [
        lambda llm, path: llm.generate([5] * 40, speculation="ngram"),
        lambda llm, path: llm.stream([5] * 40, keep_selection=True),
        lambda llm, path: llm.generate([5] * 300, policy=AdaKV(min_tokens=8), decode_budget=32),
        lambda llm, path: llm.load_session(path),
        lambda llm, path: llm.session().save(path),
    ],
)
def test_requests_of_one_process_are_refused(work: Callable[..., Any], shared: Shared, tmp_path: Path) -> None:
    with pytest.raises(FastKVError, match="does not go with tensor_parallel"):
        shared.run(lambda llm: work(llm, tmp_path / "s.safetensors"))


def test_a_policy_from_elsewhere_says_that_it_works(shared: Shared) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Elsewhere(SnapKV):
        name: ClassVar[str] = "elsewhere"

    with pytest.raises(FastKVError, match="policy elsewhere does not say that it works"):
        shared.run(lambda llm: llm.generate([5] * 40, policy=Elsewhere()))


def test_processes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    check_started(1)
    with pytest.raises(FastKVError, match="start the program by torchrun --nproc-per-node 2"):
        LLM("anything", tensor_parallel=2)
    told = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FastKVError, match="tensor_parallel is 2, but torchrun has started 3"):
        check_started(2)
    with pytest.raises(FastKVError, match="tensor_parallel must be"):
        check_started(0)


def test_a_connection_that_breaks_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def all_reduce(self, x: Tensor) -> None:
            raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer\nand more")

        all_gather = all_reduce

    ranks = object.__new__(ProcessRanks)
    ranks.count, ranks._dist = 2, Broken()
    with pytest.raises(ranks_module.RankLostError, match="another rank has ended"):
        ranks.sum_(torch.ones(2))
