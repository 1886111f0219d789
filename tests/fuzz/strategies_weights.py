"""Changes to safetensors files and their index."""

from __future__ import annotations

from fuzz.base_folders import INDEX, WEIGHTS
from fuzz.edits import GONE, Cut, Edit, Flip, Header, Put, PutSomewhere, Renamed
from fuzz.strategies_values import integers, values
from hypothesis import strategies as st

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
FILES = st.sampled_from([WEIGHTS, WEIGHTS, *SHARDS])
DTYPES = ["F32", "F16", "BF16", "F64", "I8", "U8", "I64", "BOOL", "F8_E4M3", "F8_E5M2", "C64", "F4", "f32", "", "?"]
NAMES = ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"]
HOMES = [
    *SHARDS,
    "missing.safetensors",
    "../model.safetensors",
    "/model.safetensors",
    "a/b.safetensors",
    "",
    ".",
    "..",
    "x.bin",
    "\0.safetensors",
    ".safetensors",
]


def weight_edits() -> st.SearchStrategy[Edit]:
    tensor = st.integers(0, 30)
    shape = st.lists(integers(), max_size=4) | st.sampled_from([[340, 16], [16], [16, 16], [8, 16], [24, 16], []])
    offsets = st.lists(integers(), min_size=2, max_size=2)
    headers = st.one_of(
        st.builds(Header, FILES, tensor, st.just("dtype"), st.sampled_from(DTYPES)),
        st.builds(Header, FILES, tensor, st.just("shape"), shape),
        st.builds(Header, FILES, tensor, st.just("data_offsets"), offsets),
        st.builds(Header, FILES, tensor, st.sampled_from(["", "dtype", "shape", "data_offsets"]), values()),
        st.builds(
            Header, FILES, tensor, st.just(""), st.just(GONE), integers() | st.sampled_from([2**64 - 1, 10**8, 2300])
        ),
    )
    flips = st.builds(Flip, FILES, st.integers(0, 3000) | st.integers(-3000, -1), st.integers(1, 255))
    cuts = st.builds(Cut, FILES, st.floats(0, 1))
    return headers | flips | cuts | _index() | st.builds(Renamed, FILES, FILES)


def _index() -> st.SearchStrategy[Edit]:
    name = st.sampled_from(NAMES) | st.text(max_size=5)
    home = st.sampled_from(HOMES) | values()
    return st.one_of(
        st.builds(Put, st.just(INDEX), st.tuples(st.just("weight_map"), name), home),
        st.builds(Put, st.just(INDEX), st.just(("weight_map",)), values()),
        st.builds(PutSomewhere, st.just(INDEX), st.integers(0, 40), home),
    )
