"""The steps of gpu_suite.py: names, cases, how long each is expected to take on an H100, and what it measures.

A case is what is guarded, skipped and recorded on its own. Estimates, in seconds, are for an 8B model on an H100; a
step's first case carries what the step begins with.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import device_ceilings
import layer_pairs
import old_ways
import synthetic
from operations import lines, profiled
from runners import Runner, engine, measure, random_prompts, transformers
from selection import timed
from suite_case import ROOT, Case, NotNeededError, Suite

from fastkv import LLM, SamplingParams
from fastkv.cache.catalogue import POLICIES
from fastkv.cache.policy import Policy, plan_layers
from fastkv.engine.cost import decode_bytes
from fastkv.models.presets import PRESETS

K = 1024
# What torch's compiler tries for longer: other tilings of each kernel, and kernels that begin before the last one ends.
TUNED = {"TORCHINDUCTOR_COORDINATE_DESCENT_TUNING": "1", "TORCHINDUCTOR_ENABLE_PDL": "1"}


def gpu_tests(suite: Suite) -> dict[str, Any]:
    """The tests that only a GPU can run, in a process of their own; the whole output goes into a file."""
    argv = ["-m", "pytest", "-q", "-rfE", "--tb=short", "--durations=8", "-p", "no:cacheprovider", "tests/gpu"]
    status, output = suite.child(argv, max(5.0, min(120.0, suite.left)))
    name = f"{suite.record.about['date']}-gpu-tests.txt"
    (suite.record.folder / name).write_text(output, encoding="utf-8")
    kept = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR")) or " passed" in line]
    said = kept or output.splitlines()[-3:]
    for line in said:
        suite.record.say(f"    {line}")
    return {"exit_status": status, "summary": said, "output": name}


def load(suite: Suite) -> dict[str, Any]:
    """How long random weights take."""
    started = time.perf_counter()
    llm = suite.llm
    weights = sum(each.nbytes for each in llm.model.parameters())
    return {"seconds": time.perf_counter() - started, "weight_bytes": weights}


def ceilings(suite: Suite) -> Iterator[Case]:
    """Copy, product, matrices of one token, and both fast attentions."""
    config, device, dtype = suite.config, suite.device, suite.dtype
    yield Case("copy", 2, partial(device_ceilings.copy_bandwidth, device))
    yield Case("product", 1, partial(device_ceilings.product_speed, device, dtype))

    def one_token(shape: tuple[int, int]) -> dict[str, Any]:
        return device_ceilings.matrix_vector(
            shape, device, dtype, suite.record.figure("ceilings", "copy", "bytes_per_s")
        )

    for name, shape in device_ceilings.matrices_of(config).items():
        yield Case(f"one token x {name}", 1, partial(one_token, shape))
    for context, seconds in ((8, 1), (32, 1), (128, 3)):
        for backend in ("flash", "cudnn"):
            work = device_ceilings.attention_speed
            n_tokens = suite.tokens(context * K)
            yield Case(f"{backend} {context}K", seconds, partial(work, backend, n_tokens, config, device, dtype))


def decoding(suite: Suite) -> Iterator[Case]:
    """Steps on random caches: one sequence first, then several."""
    shapes = [(context, 1) for context in (1, 8, 32, 128)] + [(32, 4), (128, 4), (32, 8)]
    for context, batch in shapes:
        for name in ("full", "fastkv"):
            seconds = 1.5 + context * batch / 128
            case = f"{name} {context}K x {batch}"
            yield Case(case, seconds, partial(decode, suite, name, context * K, batch))


def decode(suite: Suite, name: str, context: int, batch: int, cuda_graph: bool | None = None) -> dict[str, Any]:
    """One of them."""
    n_tokens, llm, policy = suite.tokens(context), suite.llm, POLICIES[name]()
    with synthetic.switched(llm, cuda_graph=cuda_graph):
        result = synthetic.decode(llm, policy, n_tokens, batch)
    copy = suite.record.figure("ceilings", "copy", "bytes_per_s")
    return decoded_figures(result, llm, policy, n_tokens, batch, copy)


def decoded_figures(
    result: synthetic.Decoded, llm: LLM, policy: Policy, context: int, batch: int, copy: float | None
) -> dict[str, Any]:
    """Speed, what had to be read for it, and what ran. copy: bytes/s of a copy, None where it is not known."""
    step = statistics.median(result.intervals)
    plans = plan_layers(policy, llm.config.n_layers, context)
    read = decode_bytes(llm.config, plans, len(result.intervals) / 2, llm.dtype.itemsize, batch) / step
    return {
        "context": context,
        "batch": batch,
        "step_ms": 1e3 * step,
        "tokens_per_s": batch / step,
        "gb_per_s": read / 1e9,
        **({} if copy is None else {"of_copy": read / copy}),
        "slowest_step_ms": 1e3 * max(result.intervals),
        "graphs": result.graphs,
        "attention": result.attention,
        "capture_s": result.capture_s,
        "kv_gib": result.kv_bytes / 2**30,
        "peak_bytes": result.peak_bytes,
        "intervals_ms": [round(1e3 * each, 3) for each in result.intervals],
    }


def first_tokens(suite: Suite, attentions: tuple[str, ...], contexts: tuple[int, ...] = (32, 8)) -> Iterator[Case]:
    """Shorter prompts, with the kernels that are named."""
    for context in contexts:
        for attention in attentions:
            for name in ("fastkv", "full"):
                case = f"{name} {context}K {attention}"
                yield Case(case, 0.16 * context, partial(first_token, suite, name, context * K, attention, 2))


def first_token(suite: Suite, name: str, context: int, attention: str, rounds: int) -> dict[str, Any]:
    """Seconds to the first token: the median of `rounds` after one run in which torch's choice of kernels is read."""
    llm, policy, n_tokens = suite.llm, POLICIES[name](), suite.tokens(context)
    params = SamplingParams(max_tokens=1, ignore_eos=True)
    prompts = random_prompts(llm.config.vocab_size, n_tokens, 1)
    with synthetic.switched(llm, attention=attention):
        suite.clean()
        with synthetic.attention_kernels() as seen:
            warm_up = llm.generate(next(prompts)[0].tolist(), params, policy).metrics
        runs = [llm.generate(next(prompts)[0].tolist(), params, policy).metrics for _ in range(rounds)]
    return {
        "context": n_tokens,
        "ttft_s": statistics.median(run.ttft_s for run in runs),
        "warm_up_s": warm_up.ttft_s,
        "attention": ", ".join(f"{kernel} x {count}" for kernel, count in seen.items()),
        "kv_bytes": runs[-1].kv_bytes,
        "peak_bytes": runs[-1].peak_bytes,
        "runs_s": [run.ttft_s for run in runs],
    }


def profile_decoding(suite: Suite) -> dict[str, Any]:
    """The kernels of 16 steps after a prompt of 1K."""
    suite.clean()
    llm, policy = suite.llm, POLICIES["fastkv"]()
    with synthetic.switched(llm), synthetic.Sequences(llm, policy, suite.tokens(K), 1, 48) as sequences:
        for _ in range(4):
            sequences.step()

        def work() -> None:
            for _ in range(16):
                sequences.step()

        return profile(suite, "16 decode steps", work)


def profile_prefill(suite: Suite, context: int) -> dict[str, Any]:
    """The kernels of one prefill."""
    suite.clean()
    llm, policy = suite.llm, POLICIES["fastkv"]()
    ids = next(random_prompts(llm.config.vocab_size, suite.tokens(context), 1))
    if context < 128 * K:
        llm.prefill(ids, policy)
    return profile(suite, f"prefill of {ids.shape[1]:,} tokens", lambda: llm.prefill(ids, policy))


def profile(suite: Suite, title: str, work: Callable[[], object]) -> dict[str, Any]:
    """Print and return the costly kernels, and how much of the time the device did nothing."""
    seconds, shares = profiled(work, suite.device)
    busy = sum(share.seconds for share in shares)
    for line in "\n".join(lines(title, seconds, shares, 20)).splitlines():
        suite.record.say(line)
    return {
        "seconds": seconds,
        "busy_s": busy,
        "idle_share": 1 - busy / seconds,
        "calls": sum(share.count for share in shares),
        "kernels": [{"name": share.name, "calls": share.count, "seconds": share.seconds} for share in shares[:20]],
    }


def end_to_end(suite: Suite) -> Iterator[Case]:
    """A prompt of 8K and 33 new tokens, through this engine and through the peer."""

    def ours(name: str) -> Runner:
        return engine(suite.llm, POLICIES[name]())

    makers: dict[str, Callable[[], Runner]] = {
        "fastkv": lambda: ours("fastkv"),
        "full": lambda: ours("full"),
        "transformers": lambda: transformers(suite.llm),
    }
    for name, seconds in (("fastkv", 4), ("full", 4), ("transformers", 20)):
        yield Case(f"{name} 8K + 33", seconds, partial(answer, suite, makers[name]))


def answer(suite: Suite, make: Callable[[], Runner]) -> dict[str, Any]:
    """Medians of two rounds after one that does not count."""
    suite.clean()
    n_tokens = suite.tokens(8 * K)
    prompts = random_prompts(suite.llm.config.vocab_size, n_tokens, 1)
    samples = measure({"": make()}, prompts, 33, rounds=2, warm_ups=1)[""]
    keys = ("ttft_s", "decode_tokens_per_s", "total_s")
    medians = {key: statistics.median(getattr(sample, key) for sample in samples) for key in keys}
    return {"context": n_tokens, **medians, "peak_bytes": samples[-1].peak_bytes}


def new_lengths(suite: Suite, context: int, attention: str, padded: bool) -> dict[str, Any]:
    """Seconds to the first tokens of prompts whose lengths nobody has seen, after one that does not count."""
    llm, policy, runs = suite.llm, POLICIES["fastkv"](), []
    params = SamplingParams(max_tokens=1, ignore_eos=True)
    lengths = layer_pairs.lengths_below(suite.tokens(context), 14)[6 + padded :: 2]  # the first six were one layer's
    way = nullcontext() if padded else old_ways.no_padding()
    with synthetic.switched(llm, attention=attention), way:
        suite.clean()
        for length in lengths:
            ids = next(random_prompts(llm.config.vocab_size, length, 1))[0].tolist()
            runs.append(llm.generate(ids, params, policy).metrics)
    return {
        "context": lengths[-1],
        "ttft_s": statistics.median(run.ttft_s for run in runs[1:]),
        "warm_up_s": runs[0].ttft_s,
        "peak_bytes": max((run.peak_bytes for run in runs if run.peak_bytes is not None), default=None),
        "runs_s": [run.ttft_s for run in runs],
    }


def compiled(suite: Suite, step: str, more: tuple[str, ...], settings: dict[str, str]) -> dict[str, Any]:
    """Decoding by a model whose layers are compiled, in a process of its own: whatever it does, the run continues.

    more: arguments of compiled_decode.py. settings: variables for its environment.
    """
    args, copy = suite.args, suite.record.figure("ceilings", "copy", "bytes_per_s")
    model = args.model if args.model in PRESETS else str(Path(args.model).resolve())
    argv = [str(ROOT / "benchmarks" / "compiled_decode.py"), model, "--device", str(suite.device)]
    argv += ["--dtype", args.dtype, "--context", *(str(suite.tokens(context * K)) for context in (1, 128))]
    argv += [] if copy is None else ["--copy", str(copy)]
    status, output = suite.child([*argv, *more], max(5.0, min(150.0, suite.left)), settings)
    figures = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    for each in figures:
        suite.record.add(step, each.pop("case"), "done", **each)
    if status != 0:
        end = "ran out of time" if status is None else f"exit status {status}"
        raise RuntimeError(f"{end}; {len(figures)} figures; last lines: " + " / ".join(output.splitlines()[-4:]))
    return {"exit_status": status, "count": len(figures)}


def selection(suite: Suite, context: int) -> dict[str, Any]:
    """What choosing costs in relation to its layer."""
    suite.clean()
    select, layer = timed(suite.llm, suite.tokens(context), 1)
    return {"selection_ms": 1e3 * select, "layer_ms": 1e3 * layer, "share": select / layer}


def long_prompt(suite: Suite, context: int) -> dict[str, Any]:
    """First token and decoding after a very long prompt, told layer by layer; a shorter one only if none was done."""
    done = [each for each in suite.record.entries if each["step"] == "million" and each["status"] == "done"]
    if done:
        raise NotNeededError("the longer one was measured")
    suite.clean()
    llm, n_tokens = suite.llm, suite.tokens(context)
    ids = next(random_prompts(llm.config.vocab_size, n_tokens, 1))[0].tolist()
    params, intervals = SamplingParams(max_tokens=33, ignore_eos=True), []

    def tell(layer: int, seconds: float) -> None:
        suite.record.say(f"    {n_tokens:,} tokens, layer {layer}: {seconds:.2f} s")

    with synthetic.attention_kernels() as seen, synthetic.layer_times(llm, tell):
        stream = llm.stream(ids, params, POLICIES["fastkv"]())
        next(stream)
        ttft = stream.output().metrics.ttft_s
        suite.record.add("million", f"{n_tokens:,} first token", "running", ttft_s=ttft)
        before = time.perf_counter()
        for _ in stream:
            now = time.perf_counter()
            intervals.append(now - before)
            before = now
    metrics, step = stream.output().metrics, statistics.median(intervals)
    return {
        "context": n_tokens,
        "ttft_s": ttft,
        "step_ms": 1e3 * step,
        "tokens_per_s": 1 / step,
        "attention": ", ".join(f"{kernel} x {count}" for kernel, count in seen.items()),
        "kv_bytes": metrics.kv_bytes,
        "peak_bytes": metrics.peak_bytes,
        "intervals_ms": [round(1e3 * each, 3) for each in intervals],
    }


def sessions(suite: Suite) -> Iterator[Case]:
    """A document read once, then questions of 64 tokens, each asked of a fork."""
    for name, context, seconds in (("fastkv", 128, 14), ("keydiff", 128, 25), ("full", 32, 5), ("kvzip", 32, 15)):
        yield Case(f"{name} {context}K", seconds, partial(ask_forks, suite, name, context * K))


def ask_forks(suite: Suite, name: str, context: int) -> dict[str, Any]:
    """Seconds until a document is read, and from each question to its first token; one question does not count."""
    suite.clean()
    llm, n_tokens = suite.llm, suite.tokens(context)
    prompts = random_prompts(llm.config.vocab_size, n_tokens, 1)
    session = llm.session(POLICIES[name]())
    read = session.add(next(prompts)[0].tolist())
    params, questions = SamplingParams(max_tokens=33, ignore_eos=True), random_prompts(llm.config.vocab_size, 64, 1)
    answers = [session.fork().generate(next(questions)[0].tolist(), params).metrics for _ in range(4)]
    return {
        "context": n_tokens,
        "read_s": read.ttft_s,
        "session_bytes": session.kv_bytes,
        "first_question_ttft_s": answers[0].ttft_s,
        "ttft_s": statistics.median(each.ttft_s for each in answers[1:]),
        "tokens_per_s": statistics.median(each.decode_tokens_per_s or 0 for each in answers[1:]),
        "peak_bytes": answers[-1].peak_bytes,
    }


def variants(suite: Suite) -> Iterator[Case]:
    """8K in other ways: decoding without graphs, prefill with each attention."""
    for name in ("full", "fastkv"):
        yield Case(f"{name} 8K no graphs", 3, partial(decode, suite, name, 8 * K, 1, cuda_graph=False))
    yield from first_tokens(suite, ("flash", "cudnn"), (8,))


def tests(suite: Suite) -> Iterator[Case]:
    yield Case("tests/gpu", 75, partial(gpu_tests, suite))


def model(suite: Suite) -> Iterator[Case]:
    yield Case("random weights", 12, partial(load, suite))
    yield Case("what runs here", 1, partial(layer_pairs.ways, suite.config, suite.device, suite.dtype))


def first_128k(suite: Suite) -> Iterator[Case]:
    for name, seconds in (("fastkv", 18), ("full", 32)):
        yield Case(f"{name} 128K auto", seconds, partial(first_token, suite, name, 128 * K, "auto", 1))


def tsp_layer(suite: Suite) -> Iterator[Case]:
    """Attention of the propagated tokens alone against that of all tokens: of the layer, then the first token."""
    layer = suite.config, suite.device, suite.dtype
    for context, seconds in ((32, 1), (64, 2), (128, 4)):
        for name, passage in (("by chance", 1), ("in passages", layer_pairs.PASSAGE)):
            work = partial(layer_pairs.tsp_attention, suite.tokens(context * K), passage, *layer)
            yield Case(f"attention {context}K {name}", seconds, work)
    alone = partial(first_token, suite, "fastkv", 128 * K, "auto", 1)
    yield Case("fastkv 128K all tokens", 18, partial(in_the_old_way, old_ways.all_tokens_attend, alone))
    yield Case("fastkv 128K propagated alone", 18, alone)


def in_the_old_way(
    way: Callable[[], AbstractContextManager[None]], work: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """What `work` measures, while the engine does as before."""
    with way():
        return work()


def padding(suite: Suite) -> Iterator[Case]:
    """What a length that cuDNN has not seen costs, as it is and padded: one layer's attention, and the first token."""
    for context in (4, 8, 32):
        layer = suite.tokens(context * K), suite.config, suite.device, suite.dtype
        yield Case(f"cudnn {context}K attention", 2, partial(layer_pairs.new_lengths, *layer))
        for name, attention, padded in (
            ("flash", "flash", False),
            ("cudnn", "cudnn", False),
            ("cudnn padded", "cudnn", True),
        ):
            work = partial(new_lengths, suite, context * K, attention, padded)
            yield Case(f"fastkv {context}K {name}", 0.2 * context, work)


def window_scores(suite: Suite) -> Iterator[Case]:
    """A layer's scores from a float32 copy of its keys, and without one."""
    for context, name in ((128 * K, "128K"), (1_000_000, "1,000,000")):
        layer = suite.tokens(context), suite.config, suite.device, suite.dtype
        yield Case(name, 1, partial(layer_pairs.window_scores, *layer))


def profiles(suite: Suite) -> Iterator[Case]:
    yield Case("decode fastkv 1K", 6, partial(profile_decoding, suite))
    for context, seconds in ((8, 4), (128, 20)):
        yield Case(f"prefill fastkv {context}K", seconds, partial(profile_prefill, suite, context * K))


def compiling(
    suite: Suite, step: str = "compiled", more: tuple[str, ...] = (), settings: dict[str, str] | None = None
) -> Iterator[Case]:
    yield Case("decode, torch.compile", 40, partial(compiled, suite, step, more, settings or {}))


def selections(suite: Suite) -> Iterator[Case]:
    for context, seconds in ((8, 2), (32, 5)):
        yield Case(f"{context}K", seconds, partial(selection, suite, context * K))


def million(suite: Suite) -> Iterator[Case]:
    yield Case("1,000,000", 340, partial(long_prompt, suite, 1_000_000))
    yield Case("512K", 110, partial(long_prompt, suite, 512 * K))


# In the order in which they run
STEPS: dict[str, Callable[[Suite], Iterator[Case]]] = {
    "tests": tests,
    "ceilings": ceilings,
    "model": model,
    "decode": decoding,
    "first-128k": first_128k,
    "first": partial(first_tokens, attentions=("auto", "cudnn")),
    "tsp-layer": tsp_layer,
    "padding": padding,
    "scores": window_scores,
    "profiles": profiles,
    "peer": end_to_end,
    "compiled": compiling,
    "compiled-apart": partial(compiling, step="compiled-apart", more=("--apart",)),
    "sessions": sessions,
    "selection": selections,
    "million": million,
    "variants": variants,
    "compiled-tuned": partial(compiling, step="compiled-tuned", settings=TUNED),
}
ONLY_BY_NAME = ("variants", "compiled-tuned")
