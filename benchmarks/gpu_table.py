"""Print the figures of a JSON file of gpu_suite.py as Markdown tables, those of docs/speed.md.

    python benchmarks/gpu_table.py RESULT.json [--tables decode first …]

Reads what was measured and measures nothing. A table without figures is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Figure = dict[str, Any]
GIB = 2**30


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; "" where there are no rows."""
    lines = [" | ".join(row) for row in rows]
    marks = "|".join(["---"] * len(header))
    return "\n".join([f"| {' | '.join(header)} |", f"|{marks}|", *(f"| {line} |" for line in lines)]) if lines else ""


def done(result: Figure, *steps: str) -> list[Figure]:
    """The figures of these steps, as far as they were measured."""
    return [each for each in result["figures"] if each["step"] in steps and each["status"] == "done"]


def words(figure: Figure) -> list[str]:
    """The words of a case: the policy comes first in most."""
    return str(figure["case"]).split()


def times_full(figure: Figure, figures: list[Figure], key: str, faster_is: Callable[[float, float], float]) -> str:
    """How many times as fast as the full cache of the same case, of which every other word is the same."""
    rest = words(figure)[1:]
    full = [each for each in figures if words(each)[0] == "full" and words(each)[1:] == rest]
    return f"{faster_is(figure[key], full[0][key]):.2f}" if full else "–"


def more(ours: float, full: float) -> float:
    """For speeds."""
    return ours / full


def less(ours: float, full: float) -> float:
    """For times."""
    return full / ours


def gib(size: float | None) -> str:
    """Bytes as GiB."""
    return "–" if size is None else f"{size / GIB:.1f}"


def of_copy(figure: Figure) -> str:
    """A share of the bytes per second of a copy, where that was measured."""
    return f"{figure['of_copy']:.0%}".replace("%", " %") if "of_copy" in figure else "–"


def about(result: Figure) -> str:
    """What was measured where."""
    return (
        f"{result['device']}, {result['date']}, torch {result['torch']}, cuDNN {result['cudnn']}; the shape of "
        f"{result['model']}, {result['weights']} weights, bfloat16. Command: `{result['command']}`"
    )


def ceilings(result: Figure) -> str:
    """What the device can do by itself."""
    rows = []
    for each in done(result, "ceilings"):
        speed = each.get("flops_per_s")
        shown = f"{speed / 1e12:,.0f} TFLOP/s" if speed else f"{each['bytes_per_s'] / 1e9:,.0f} GB/s"
        names = {"flash": "causal attention, flash,", "cudnn": "causal attention, cuDNN,"}
        first, *rest = words(each)
        rows.append([" ".join([names.get(first, first), *rest]), shown, of_copy(each)])
    return table(("the device alone", "", "of copy"), rows)


def decode(result: Figure) -> str:
    """Speed of decoding."""
    figures = done(result, "decode")
    header = ("prompt, tokens", "sequences", "", "tokens/s", "× full", "step, ms", "of copy", "KV, GiB", "peak, GiB")
    return table(
        header,
        (
            [
                f"{each['context']:,}",
                str(each["batch"]),
                words(each)[0],
                f"{each['tokens_per_s']:,.1f}",
                times_full(each, figures, "tokens_per_s", more),
                f"{each['step_ms']:.2f}",
                of_copy(each),
                f"{each['kv_gib']:.2f}",
                gib(each["peak_bytes"]),
            ]
            for each in figures
        ),
    )


def first(result: Figure) -> str:
    """Time to the first token."""
    figures = sorted(done(result, "first", "first-128k"), key=lambda each: each["context"])
    header = ("prompt, tokens", "`--attention`", "", "first token, s", "× full", "KV, GiB", "peak, GiB")
    return table(
        header,
        (
            [
                f"{each['context']:,}",
                words(each)[-1],
                words(each)[0],
                f"{each['ttft_s']:.3f}",
                times_full(each, figures, "ttft_s", less),
                f"{each['kv_bytes'] / GIB:.2f}",
                gib(each["peak_bytes"]),
            ]
            for each in figures
        ),
    )


def peer(result: Figure) -> str:
    """A whole answer, through this engine and through transformers."""
    figures = done(result, "peer")
    header = ("", "first token, s", "decode, tokens/s", "end to end, s", "× full", "peak, GiB")
    return table(
        header,
        (
            [
                words(each)[0],
                f"{each['ttft_s']:.3f}",
                f"{each['decode_tokens_per_s']:.1f}",
                f"{each['total_s']:.3f}",
                times_full(each, figures, "total_s", less),
                gib(each["peak_bytes"]),
            ]
            for each in figures
        ),
    )


def compiled(result: Figure) -> str:
    """Decoding with compiled layers, and without."""
    plain = {(words(each)[0], each["context"]): each for each in done(result, "decode") if each["batch"] == 1}
    rows = []
    for each in (each for each in done(result, "compiled") if "step_ms" in each):
        other = plain.get((words(each)[0], each["context"]))
        before = ("–", "–") if other is None else (f"{other['tokens_per_s']:.1f}", of_copy(other))
        rows.append(
            [f"{each['context']:,}", words(each)[0], f"{each['tokens_per_s']:.1f}", of_copy(each), before[0], before[1]]
        )
    header = ("prompt, tokens", "", "`--compile`: tokens/s", "of copy", "without: tokens/s", "of copy")
    return table(header, rows)


def selection(result: Figure) -> str:
    """What choosing costs."""
    rows = (
        [words(each)[0], f"{each['selection_ms']:.2f}", f"{each['layer_ms']:.1f}", f"{100 * each['share']:.1f} %"]
        for each in done(result, "selection")
    )
    return table(("prompt, tokens", "selection, ms", "its layer, ms", "share"), rows)


def million(result: Figure) -> str:
    """The longest prompt, with FastKV."""
    rows = (
        [
            f"{each['context']:,}",
            f"{each['ttft_s']:.1f}",
            f"{each['tokens_per_s']:.1f}",
            f"{each['kv_bytes'] / GIB:.2f}",
            gib(each["peak_bytes"]),
        ]
        for each in done(result, "million")
    )
    return table(("prompt, tokens", "first token, s", "decode, tokens/s", "KV, GiB", "peak, GiB"), rows)


def tsp_layer(result: Figure) -> str:
    """Attention of the propagated tokens alone at the TSP layer: of the layer, and what the first token gains."""
    header = ("prompt, tokens", "", "all tokens attend, ms", "the propagated alone, ms", "× as fast")
    figures = done(result, "tsp-layer")
    all_tokens = {each["context"]: each for each in figures if str(each["case"]).endswith("all tokens")}
    rows = []
    for each in figures:
        if "alone_s" in each:
            name, pair = f"attention, {' '.join(words(each)[2:])}", (each["all_s"], each["alone_s"])
        elif str(each["case"]).endswith("alone") and each["context"] in all_tokens:
            name, pair = "first token", (all_tokens[each["context"]]["ttft_s"], each["ttft_s"])
        else:
            continue
        rows.append([f"{each['context']:,}", name, *(f"{1e3 * s:,.1f}" for s in pair), f"{pair[0] / pair[1]:.2f}"])
    return table(header, rows)


def padding(result: Figure) -> str:
    """What a length costs that cuDNN has not seen, by kernels: of one attention, and of a whole prefill."""
    figures = {each["case"]: each for each in done(result, "padding")}
    rows = []
    for size in dict.fromkeys(words(each)[1] for each in figures.values()):
        layer = figures.get(f"cudnn {size} attention")
        if layer:
            for name, key in (("a new length", "first"), ("the same again", "again")):
                pair = (layer[f"as_it_is_{key}_ms"], layer[f"padded_{key}_ms"])
                rows.append([size, f"one attention, {name}", "–", *(f"{ms:.2f}" for ms in pair)])
        prefills = [figures.get(f"fastkv {size} {kernels}") for kernels in ("flash", "cudnn", "cudnn padded")]
        for name, key in (("first token, a new length", "ttft_s"), ("first token, the first prompt", "warm_up_s")):
            cells = ["–" if each is None else f"{1e3 * each[key]:,.1f}" for each in prefills]
            rows.extend([[size, name, *cells]] if any(prefills) else [])
    return table(("prompt, about", "ms", "flash", "cuDNN", "cuDNN, padded"), rows)


def scores(result: Figure) -> str:
    """Scores of a window, from a float32 copy of the keys and without one."""
    rows = (
        [
            f"{each['context']:,}",
            *(f"{1e3 * each[key]:.2f}" for key in ("copied_s", "direct_s")),
            *(gib(each[key]) for key in ("copied_peak_bytes", "direct_peak_bytes")),
        ]
        for each in done(result, "scores")
    )
    header = ("prompt, tokens", "with a copy, ms", "without, ms", "with a copy, peak, GiB", "without, peak, GiB")
    return table(header, rows)


def regions(result: Figure) -> str:
    """Compiled decoding, with what lies between two attentions as two regions and as one."""
    one = {each["case"]: each for each in done(result, "compiled") if "step_ms" in each}
    rows = (
        [f"{each['context']:,}", words(each)[0]]
        + [f"{regions['tokens_per_s']:.1f}" for regions in (each, one[each["case"]])]
        for each in done(result, "compiled-apart")
        if each["case"] in one
    )
    return table(("prompt, tokens", "", "two regions: tokens/s", "one: tokens/s"), rows)


TABLES: dict[str, Callable[[Figure], str]] = {
    "decode": decode,
    "first": first,
    "peer": peer,
    "compiled": compiled,
    "selection": selection,
    "million": million,
    "ceilings": ceilings,
    "tsp-layer": tsp_layer,
    "padding": padding,
    "scores": scores,
    "regions": regions,
}


def read_result(path: Path) -> Figure:
    """A file of gpu_suite.py. Raises ValueError, with a line that names the file, for anything else."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise ValueError(f"{path}: is no JSON file") from None
    if not isinstance(result, dict) or not {"figures", "device", "date", "command"} <= result.keys():
        raise ValueError(f"{path}: is no result of gpu_suite.py")
    return result


def markdown(result: Figure, names: Iterable[str]) -> str:
    """The line about the run, then these tables."""
    tables = (TABLES[name](result) for name in names)
    return "\n\n".join([about(result), *(each for each in tables if each)])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 done, 2 a user's mistake."""
    made = argparse.ArgumentParser(prog="gpu_table.py", description="Tables of a JSON file of gpu_suite.py.")
    made.add_argument("result", type=Path, metavar="RESULT.json")
    made.add_argument(
        "--tables", nargs="+", choices=TABLES, default=list(TABLES), metavar="NAME", help=", ".join(TABLES)
    )
    args = made.parse_args(argv)
    try:
        print(markdown(read_result(args.result), args.tables))
    except ValueError as error:
        print(f"gpu_table.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
