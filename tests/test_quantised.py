"""Entries of 8 or 4 bits: what a code stands for, which entries stay exact, and that every policy goes on with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from caches import CPU
from test_policies import small
from torch import Tensor

from fastkv import LLM, FastKVError, FullKV, SamplingParams, SnapKV
from fastkv.cache.catalogue import POLICIES
from fastkv.cache.dense import DenseLayer
from fastkv.cache.kv_cache import KVCache
from fastkv.cache.layer import EntryShape, KVLayer
from fastkv.cache.model_wide import ModelWideLayer
from fastkv.cache.per_head import PerHeadLayer
from fastkv.cache.policies.read_few import ReadByBudget
from fastkv.cache.pool import KVPool
from fastkv.cache.quantised import REWIND, SINKS, QuantisedLayer
from fastkv.cache.quantised_layouts import quantised
from fastkv.cache.selection import PerHead
from fastkv.engine.attention import attend_parts
from fastkv.engine.runtime import Runtime
from fastkv.engine.step import EagerStepper
from fastkv.kernels.packing import KV_DTYPES, SCHEMES, Packed, pack, unpack

PLAIN = (DenseLayer, PerHeadLayer, ModelWideLayer)
SHAPE = EntryShape(n_kv_heads=2, head_dim=8, dtype=torch.float32)
every_dtype = pytest.mark.parametrize("kv_dtype", KV_DTYPES)
every_layout = pytest.mark.parametrize("plain", PLAIN, ids=lambda each: each.__name__)


@pytest.fixture
def llm(tiny_llm: LLM) -> Iterator[LLM]:
    """To be set to any kv_dtype."""
    yield tiny_llm
    tiny_llm.kv_dtype = None


def entries(count: int, seed: int = 0, head_dim: int = 8) -> tuple[Tensor, Tensor]:
    """k and v [1, 2, count, D]: keys with a large channel, values of any sign."""
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, 1, 2, count, head_dim, generator=generator)
    k[..., 3] += 20
    return k, v


def packed(kv_dtype: str, k: Tensor, v: Tensor) -> Packed:
    scheme = SCHEMES[kv_dtype]
    n_blocks = k.shape[1] // scheme.block
    into = Packed(*(torch.zeros(2, n_blocks, *shape, dtype=dtype) for shape, dtype in scheme.shapes(k.shape[2])))
    pack(scheme, k, v, into)
    return into


def unpacked(kv_dtype: str, of: Packed, like: Tensor) -> tuple[Tensor, Tensor]:
    k, v = torch.empty_like(like), torch.empty_like(like)
    unpack(SCHEMES[kv_dtype], of, k, v)
    return k, v


def cache_of(layout: type[KVLayer], capacity: int = 512, room: int = 240, n_layers: int = 1) -> KVCache:
    pool = KVPool(layout, [capacity] * n_layers, 1, SHAPE, CPU)
    return KVCache(pool, pool.take_all(), room, position_limit=10_000)


def filled(layout: type[KVLayer], k: Tensor, v: Tensor, at_once: int) -> KVCache:
    """The first entries at once, each of the others in a step of its own."""
    cache = cache_of(layout)
    positions = torch.arange(at_once).expand(1, 2, -1)
    cache.begin(whole=True, room=240)
    cache.store(0, k[:, :, :at_once], v[:, :, :at_once], None, positions)
    cache.end(at_once, 10_000)
    for token in range(at_once, k.shape[2]):
        one = slice(token, token + 1)
        cache.layers[0].write(cache.slots, k[:, :, one], v[:, :, one], cache.pool.places(cache.slots, 1)[0])
        cache.advance()
    return cache


def read(cache: KVCache) -> tuple[Tensor, Tensor]:
    parts = cache.read(0)
    k, v = (torch.cat([getattr(part, name) for part in parts], dim=1) for name in "kv")
    return k, v


# --- codes ---


@every_dtype
@pytest.mark.parametrize("head_dim", [8, 64, 128])
def test_a_value_is_off_by_half_a_step_at_most(kv_dtype: str, head_dim: int) -> None:
    """And by what float16 rounds of the minimum and of the scale, 2 ** -11 of each."""
    scheme = SCHEMES[kv_dtype]
    k, v = (x[0] for x in entries(2 * scheme.block, head_dim=head_dim))
    codes = packed(kv_dtype, k, v)
    of_k = codes.k_params.float().repeat_interleave(scheme.block, 1)  # [2, n, 2, D]
    of_v = codes.v_params.float().flatten(1, 2)
    of_v = of_v.repeat_interleave(head_dim // of_v.shape[3], 3)
    for x, found, params in zip((k, v), unpacked(kv_dtype, codes, k), (of_k, of_v), strict=True):
        low, scale = params[:, :, 0], params[:, :, -1]
        rounding = (x.abs().amax() + low.abs() + scheme.levels * scale) * 2**-10
        assert ((found - x).abs() <= scale / 2 + rounding).all()
        assert (found - x).abs().max() > 0


@every_dtype
def test_the_same_value_everywhere_is_exact(kv_dtype: str) -> None:
    k = torch.full((2, SCHEMES[kv_dtype].block, 8), -2.5)
    v = torch.zeros_like(k)
    found = unpacked(kv_dtype, packed(kv_dtype, k, v), k)
    assert torch.equal(found[0], k)
    assert torch.equal(found[1], v)


def test_where_the_halves_of_a_byte_belong() -> None:
    k = torch.arange(32.0).remainder(16).repeat(2, 8, 1).transpose(1, 2).contiguous()
    k[:, :, 4:] = 15 - k[:, :, 4:]
    codes = packed("int4", k, k).k
    assert (codes[0, 0, :16, 0] == torch.arange(16) + 16 * (15 - torch.arange(16))).all()


@every_dtype
@pytest.mark.parametrize("head_dim", [64, 128])
def test_bytes_of_packed_entries(kv_dtype: str, head_dim: int) -> None:
    scheme = SCHEMES[kv_dtype]
    in_16_bits = 2 * 2 * head_dim * scheme.block
    assert scheme.block_bytes(head_dim) <= {"int8": 0.53, "int4": 0.30}[kv_dtype] * in_16_bits


def test_numbers_that_float16_does_not_have_stay_finite() -> None:
    k = torch.tensor([1e6, -1e6]).repeat(2, 32, 4)
    assert all(x.isfinite().all() for x in unpacked("int4", packed("int4", k, k), k))


# --- layers ---


@every_dtype
@every_layout
def test_one_by_one_is_all_at_once(plain: type[KVLayer], kv_dtype: str) -> None:
    layout, (k, v) = quantised(plain, kv_dtype), entries(230)
    caches = [filled(layout, k, v, at_once) for at_once in (230, 150, 3)]
    states = [cache.layers[0].state(0) for cache in caches]
    for state in states[1:]:
        assert all(torch.equal(state[name], each) for name, each in states[0].items())
    assert [cache.lengths.tolist() for cache in caches] == [[[[230, 230]]]] * 3


@every_dtype
@every_layout
def test_the_first_and_the_newest_are_exact(plain: type[KVLayer], kv_dtype: str) -> None:
    k, v = entries(230)
    found_k, found_v = read(filled(quantised(plain, kv_dtype), k, v, 200))
    for exact in (slice(SINKS), slice(-REWIND, None)):
        assert torch.equal(found_k[:, :, exact], k[:, :, exact])
        assert torch.equal(found_v[:, :, exact], v[:, :, exact])
    assert not torch.equal(found_k, k)
    torch.testing.assert_close(found_k, k, atol=0.5, rtol=0)


@every_dtype
@every_layout
@pytest.mark.parametrize(("n_new", "window"), [(1, None), (1, 60), (5, None), (5, 210)])
def test_attention_is_that_of_what_the_codes_stand_for(
    plain: type[KVLayer], kv_dtype: str, n_new: int, window: int | None
) -> None:
    k, v = entries(215 + n_new)
    cache = filled(quantised(plain, kv_dtype), k[:, :, :215], v[:, :, :215], 190)
    layer, slots = cache.layers[0], cache.slots
    layer.write(slots, k[:, :, 215:], v[:, :, 215:], cache.pool.places(slots, n_new)[0])
    q = torch.randn(1, 6, n_new, 8, generator=torch.Generator().manual_seed(9))
    expected = attend_parts(layer.read(slots, n_new), q, window)
    torch.testing.assert_close(layer.attend(slots, q, window), expected, atol=1e-4, rtol=1e-4)


@every_dtype
@every_layout
def test_what_was_forgotten_was_never_there(plain: type[KVLayer], kv_dtype: str) -> None:
    k, v = entries(230)
    cache = filled(quantised(plain, kv_dtype), k, v, 190)
    cache.truncate(REWIND)
    assert cache.position == 198
    assert torch.equal(read(cache)[0][:, :, -1], k[:, :, 197])
    with pytest.raises(FastKVError, match=r"can forget its last \d+ tokens, not 150"):
        cache.truncate(150)


@every_dtype
@every_layout
def test_another_slot_takes_a_snapshot_as_it_is(plain: type[KVLayer], kv_dtype: str) -> None:
    k, v = entries(230)
    cache = filled(quantised(plain, kv_dtype), k, v, 190)
    snapshot, other = cache.snapshot(), cache_of(quantised(plain, kv_dtype))
    other.restore(snapshot, 50)
    assert all(torch.equal(each, snapshot.layers[0][name]) for name, each in other.layers[0].state(0).items())
    assert other.count(0) == 230
    assert snapshot.nbytes == sum(each.nbytes for each in snapshot.layers[0].values())


@every_dtype
def test_heads_of_different_lengths(kv_dtype: str) -> None:
    """Of 300 entries one head keeps 3, the other 297; then both grow."""
    k, v = entries(300)
    kept = PerHead(torch.tensor([[3, 297]]), torch.cat((torch.arange(3), 300 + torch.arange(3, 300)))[None], 300)
    for plain in (PerHeadLayer, ModelWideLayer):
        cache = cache_of(quantised(plain, kv_dtype), capacity=224, n_layers=2)
        for layer in range(2):
            cache.layers[layer].store(cache.slots, k, v, kept, 60)
        for token in range(60):
            one = slice(token, token + 1)
            for layer in range(2):
                cache.layers[layer].write(cache.slots, k[:, :, one], v[:, :, one], torch.empty(0))
            cache.advance()
        for layer in range(2):
            short, long = cache.read(layer)
            assert torch.equal(short.k[0, 0], torch.cat((k[0, 0, :3], k[0, 0, :60])))
            expected = torch.cat((k[0, 1, 3:], k[0, 1, :60]))
            torch.testing.assert_close(long.k[0, 0], expected, atol=0.5, rtol=0)
            assert torch.equal(long.k[0, 0, -REWIND:], expected[-REWIND:])


@every_dtype
@every_layout
def test_bytes_are_what_is_allocated(plain: type[KVLayer], kv_dtype: str) -> None:
    pool = KVPool(quantised(plain, kv_dtype), [64, 320, 96], 2, SHAPE, CPU)
    memory = {}
    for layer in pool.layers:
        assert isinstance(layer, QuantisedLayer)
        memory |= {each.data_ptr(): each.nbytes for each in (layer.k, layer.v, *layer._packed) if each.nbytes}
    assert sum(memory.values()) == pool.nbytes


# --- requests ---

PROMPT = torch.randint(3, 256, (1, 300), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_goes_on_with_them(llm: LLM, name: str) -> None:
    """Logits of a step after it has chosen among whole entries, near those over what it kept."""
    policy, found = small(name), {}
    if name not in ("full", "pyramidinfer", "dbudget"):
        policy = type(policy)(**{**vars(policy), "kv_len": 150})
    for kv_dtype in (None, *KV_DTYPES):
        llm.kv_dtype = kv_dtype
        if kv_dtype is not None and isinstance(policy, ReadByBudget):
            with pytest.raises(FastKVError, match="look up single entries") as caught:
                llm.prefill(PROMPT, policy, 3)
            assert caught.value.setting == "kv_dtype"
            return
        pre = llm.prefill(PROMPT, policy, 3)
        assert pre.cache.layout.kv_dtype == kv_dtype
        found[kv_dtype] = pre.logits, llm.decode(pre.cache, torch.tensor([[7, 9]]))[:, 1], pre.cache.nbytes
    spread = found[None][1].std()
    for kv_dtype, off in (("int8", 0.1), ("int4", 0.8)):
        assert torch.equal(found[kv_dtype][0], found[None][0])  # the prefill attends to whole entries
        difference = (found[kv_dtype][1] - found[None][1]).abs().max()
        assert 0 < difference < off * spread
        assert found[kv_dtype][2] < found[None][2]


@every_dtype
def test_together_is_as_alone(llm: LLM, kv_dtype: str) -> None:
    llm.kv_dtype = kv_dtype
    prompts = [PROMPT[0, :count].tolist() for count in (290, 95, 200)]
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    for policy in (FullKV(), SnapKV(kv_len=110)):
        alone = [llm.generate(prompt, params, policy) for prompt in prompts]
        together = llm.generate(prompts, params, policy, batch_size=2)
        assert [out.token_ids for out in together] == [out.token_ids for out in alone]
        assert {out.run.kv_dtype for out in together} == {kv_dtype}
        assert not any(out.metrics.reused_tokens for out in together)  # a shared beginning would be packed too early


@every_dtype
def test_a_session_goes_on_and_back(llm: LLM, kv_dtype: str) -> None:
    llm.kv_dtype = kv_dtype
    session = llm.session(SnapKV(kv_len=150))
    session.add(PROMPT[0].tolist())
    begun, params = session.kv_bytes, SamplingParams(max_tokens=50, ignore_eos=True)
    first = session.generate([5, 6, 7], params).token_ids
    session.undo()
    assert session.kv_bytes == begun
    assert session.generate([5, 6, 7], params).token_ids == first
    session.rewind(20)
    with pytest.raises(FastKVError, match="can forget its last"):
        session.rewind(40)
    llm.kv_dtype = None  # it goes on as it began
    assert session.generate([8], SamplingParams(max_tokens=2)).run.kv_dtype == kv_dtype


def test_no_graph_follows_them(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    runtime = Runtime(llm.model, cuda_graph=True, attention="auto")
    buffers = runtime.buffers.lease()
    buffers.state_for(quantised(DenseLayer, "int4"), [64] * llm.config.n_layers, 1, llm.model)
    assert isinstance(runtime.stepper(buffers), EagerStepper)
    assert "with int4 entries are made without CUDA graphs, which is slower" in caplog.text


def test_a_sequence_continues_from_its_cache(llm: LLM) -> None:
    """The new tokens attend to one another as they are, and the room grows."""
    more = torch.randint(3, 256, (1, 150), generator=torch.Generator().manual_seed(2))
    logits = {}
    for kv_dtype in (None, "int8"):
        llm.kv_dtype = kv_dtype
        for policy in (FullKV(), small("adakv")):
            cache = llm.prefill(PROMPT, policy, 4).cache
            pre = llm.prefill(more, policy, 4, cache=cache)
            logits[kv_dtype, policy.name] = torch.cat((pre.logits, llm.decode(pre.cache, torch.tensor([4]))))
    for name in ("full", "adakv"):
        spread = logits[None, name].std()
        assert (logits["int8", name] - logits[None, name]).abs().max() < 0.15 * spread


def test_packed_entries_are_not_chosen_from_again(llm: LLM) -> None:
    """They would be packed a second time. What comes later is kept whole, and counted on the device, too."""
    llm.kv_dtype = "int8"
    policy = SnapKV(kv_len=150)
    cache = llm.prefill(PROMPT, policy, 4).cache
    kept = cache.positions(0)
    llm.prefill(PROMPT[:, :200], policy, 4, cache=cache)
    assert torch.equal(cache.positions(0)[:, :, :150], kept)
    assert cache.count(0) == 350
    assert cache.lengths.eq(350).all()


def test_what_does_not_go_with_them(llm: LLM, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FastKVError, match="kv_dtype must be one of int8, int4, not 'int2'"):
        llm.kv_dtype = "int2"
    with pytest.raises(FastKVError, match="prefix_cache keeps exact entries"):
        LLM(tiny_folder, device="cpu", kv_dtype="int8", prefix_cache=1000)
    session = llm.session(FullKV())
    session.add([5, 6, 7])
    session.save(tmp_path / "plain")
    llm.kv_dtype = "int8"
    with pytest.raises(FastKVError, match="decode_budget drops entries again"):
        llm.generate([5, 6, 7], decode_budget=64)
    with pytest.raises(FastKVError, match="leave kv_dtype out"):
        llm.load_session(tmp_path / "plain")
    packed = llm.session(FullKV())
    packed.add([5, 6, 7])
    with pytest.raises(FastKVError, match="entries are int8, which files do not have"):
        packed.save(tmp_path / "packed")
    with pytest.raises(FastKVError, match="lists of their own"):
        llm.generate([session.turn([4]), [5, 6]])
    cache = llm.prefill(PROMPT, FullKV(), 100).cache
    with pytest.raises(FastKVError, match="takes 32 tokens at most, not 33"):
        llm.decode(cache, PROMPT[:, :33])
