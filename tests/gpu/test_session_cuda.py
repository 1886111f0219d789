"""Sessions on a GPU: turns replay graphs in slots that other requests have used, and give what one prompt gives.

    pytest tests/gpu

Skipped where torch sees no CUDA device; continuous integration has none.
"""

from __future__ import annotations

import pytest
import torch
from places import ROOT

from fastkv import LLM, AdaKV, DefensiveKVLayer, FastKV, FullKV, KVzip, Policy, SamplingParams

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

ARCHIVE = ROOT / "examples" / "archive" / "model"
CONTEXT = torch.randint(10, 1000, (2500,), generator=torch.Generator().manual_seed(5)).tolist()
QUESTION = torch.randint(10, 1000, (40,), generator=torch.Generator().manual_seed(6)).tolist()
PARAMS = SamplingParams(max_tokens=24, ignore_eos=True)
POLICIES = [FullKV(), FastKV(), AdaKV(), DefensiveKVLayer(), KVzip(chunk=512)]
NAMES = [policy.name for policy in POLICIES]


@pytest.fixture(scope="module")
def pair() -> tuple[LLM, LLM]:
    """The bundled model in float32 (with graphs, on the CPU)."""
    return LLM(ARCHIVE, dtype="float32", device="cuda"), LLM(ARCHIVE, dtype="float32", device="cpu")


@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
def test_turns_give_what_they_give_on_a_cpu(pair: tuple[LLM, LLM], policy: Policy) -> None:
    answers = []
    for llm in pair:
        session = llm.session(policy)
        session.add(CONTEXT)
        first = session.fork().generate(QUESTION, PARAMS).token_ids
        session.generate(QUESTION[:7], PARAMS)
        session.rewind(7 + 24)
        answers.append((first, session.generate(QUESTION, PARAMS).token_ids))
    assert answers[0][0] == answers[0][1]  # what was rewound has never been
    assert answers[0] == answers[1]


def test_a_stream_that_is_left_forgets_the_steps_under_way(pair: tuple[LLM, LLM]) -> None:
    """The device is a step ahead of what was read: its entry is no part of the session."""
    session = pair[0].session(FullKV())
    session.add(CONTEXT)
    whole = session.fork().generate(QUESTION, PARAMS).token_ids
    stream = session.stream(QUESTION, PARAMS)
    pieces = [next(stream).token_id for _ in range(5)]
    stream.close()
    assert session.ids == CONTEXT + QUESTION + pieces
    more = session.generate(whole[5:6], SamplingParams(max_tokens=8, ignore_eos=True)).token_ids
    assert pieces + whole[5:6] + more == whole[:14]


def test_sessions_decode_together(pair: tuple[LLM, LLM]) -> None:
    llm = pair[0]
    sessions = [llm.session(policy) for policy in POLICIES]
    for index, session in enumerate(sessions):
        session.add(CONTEXT[: 1500 + 200 * index])
    alone = [session.fork().generate(QUESTION, PARAMS).token_ids for session in sessions]
    together = llm.generate([session.turn(QUESTION) for session in sessions], PARAMS)
    assert [output.token_ids for output in together] == alone


def test_a_second_question_allocates_little(pair: tuple[LLM, LLM]) -> None:
    """Slots and graphs are those of the question before; what is new is the fork's own snapshot."""
    session = pair[0].session(FastKV())
    session.add(CONTEXT)
    forks = [session.fork() for _ in range(3)]
    forks[0].generate(QUESTION, PARAMS)
    forks[1].generate(QUESTION, PARAMS)
    before = torch.cuda.memory_allocated()
    forks[2].generate(QUESTION, PARAMS)
    assert torch.cuda.memory_allocated() - before <= 1.5 * forks[2].kv_bytes + 2**20
