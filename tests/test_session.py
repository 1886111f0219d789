"""Sessions: many turns on one compressed cache, forks of it, ways back, and turns that fail."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastkv import (
    LLM,
    AdaKV,
    DefensiveKVLayer,
    FastKV,
    FastKVError,
    FullKV,
    GemFilter,
    Policy,
    SamplingParams,
    Session,
    SnapKV,
)
from fastkv.cache.kv_cache import KVCache
from fastkv.cache.pool import KVPool
from fastkv.engine import decode_batch
from fastkv.engine.answer import Answer
from fastkv.engine.plan import RequestPlan
from fastkv.engine.sampler import Sampler
from fastkv.engine.turn import Turn

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)
DROPPING = [
    FastKV(min_tokens=8),
    SnapKV(kv_len=30),
    AdaKV(kv_len=30),
    DefensiveKVLayer(kv_len=30),
    GemFilter(kv_len=30),
]
NAMES = [policy.name for policy in DROPPING]


@pytest.fixture(scope="module")
def chatting(archive_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """The bundled model with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(archive_folder, folder)
    each = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template = each + "{% if add_generation_prompt %}assistant: {% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    return LLM(folder, dtype="float32", device="cpu")


def ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def tokens_of(llm: LLM, prompt: list[int], policy: Policy, params: SamplingParams = PARAMS) -> list[int]:
    return llm.generate(prompt, params, policy).token_ids


# --- a full cache: any turns are one prompt ---


@pytest.mark.parametrize("pieces", [(100, 77), (1, 176), (50, 1, 1, 125)], ids=str)
@pytest.mark.parametrize("sampled", [{}, {"temperature": 1.0, "seed": 3, "repetition_penalty": 1.3}], ids=str)
def test_a_full_cache_in_any_turns_is_one_prompt(
    tiny_llm: LLM, pieces: tuple[int, ...], sampled: dict[str, Any]
) -> None:
    prompt, params = ids(177), SamplingParams(max_tokens=6, ignore_eos=True, **sampled)
    session = tiny_llm.session(FullKV())
    begin = 0
    for count in pieces[:-1]:
        session.add(prompt[begin : begin + count])
        begin += count
    output = session.generate(prompt[begin:], params)
    assert output.token_ids == tokens_of(tiny_llm, prompt, FullKV(), params)
    assert (output.metrics.prompt_tokens, output.metrics.reused_tokens) == (177 - begin, begin)
    assert session.ids == prompt + output.token_ids


def test_a_second_question_continues_after_the_first_answer(tiny_llm: LLM) -> None:
    """Its last token is read there, too: nothing had read it yet."""
    session, prompt, more = tiny_llm.session(FullKV()), ids(80), ids(20, 1)
    first = session.generate(prompt, PARAMS)
    second = session.generate(more, PARAMS)
    whole = prompt + first.token_ids + more
    assert second.token_ids == tokens_of(tiny_llm, whole, FullKV())
    assert session.ids == whole + second.token_ids


# --- compressed: as a prefill of the context, and the question after it whole ---


@pytest.mark.parametrize("policy", DROPPING, ids=NAMES)
def test_a_question_is_asked_of_what_was_kept(tiny_llm: LLM, policy: Policy) -> None:
    context, question = ids(150), ids(12, 1)
    pre = tiny_llm.prefill(context, policy, 40)
    logits = tiny_llm.prefill(question, FullKV(), 20, cache=pre.cache).logits
    expected = []
    for _ in range(6):
        expected.append(int(logits.argmax()))
        logits = tiny_llm.decode(pre.cache, torch.tensor(expected[-1:]))
    session = tiny_llm.session(policy)
    session.add(context)
    kept = session.kv_entries
    assert kept < 150 * 12
    assert session.generate(question, PARAMS).token_ids == expected
    assert session.kv_entries == kept + (12 + 5) * 12  # whole; the answer's last token has not been read


@pytest.mark.parametrize("policy", [FullKV(), *DROPPING], ids=["full", *NAMES])
def test_a_fork_goes_its_own_way(tiny_llm: LLM, policy: Policy) -> None:
    """Each question finds the document as it was, whatever another fork was asked before."""
    session = tiny_llm.session(policy)
    session.add(ids(150))
    before, questions = session.kv_bytes, [ids(10, 1), ids(14, 2), ids(10, 1)]
    answers = [session.fork().generate(question, PARAMS).token_ids for question in questions]
    assert answers[0] == answers[2]
    assert (session.kv_bytes, session.ids) == (before, ids(150))
    assert session.generate(questions[1], PARAMS).token_ids == answers[1]


@pytest.mark.parametrize("policy", [FullKV(), *DROPPING], ids=["full", *NAMES])
def test_what_was_rewound_has_never_been(tiny_llm: LLM, policy: Policy) -> None:
    session = tiny_llm.session(policy)
    session.add(ids(150))
    expected = session.fork().generate(ids(10, 1), PARAMS).token_ids
    for _ in range(2):
        session.generate(ids(9, 5), PARAMS)
    session.rewind(2 * (9 + 6))
    assert session.ids == ids(150)
    assert session.generate(ids(10, 1), PARAMS).token_ids == expected
    session.rewind(3)  # of an answer a part may stay
    assert len(session.ids) == 150 + 10 + 3
    session.rewind(len(session.ids))
    assert (session.ids, session.kv_bytes) == ([], 0)


def test_what_was_compressed_cannot_be_rewound(tiny_llm: LLM) -> None:
    session = tiny_llm.session(SnapKV(kv_len=30))
    session.add(ids(100))
    session.generate(ids(10, 1), PARAMS)
    with pytest.raises(FastKVError, match=r"forget its last 16 tokens, or all of them, not 17.*compressed.*fork"):
        session.rewind(17)
    with pytest.raises(FastKVError, match="count must be a whole number of at least 0 and at most 116, not 117"):
        session.rewind(117)
    assert len(session.ids) == 116


def test_a_turn_can_be_undone_whatever_it_did(tiny_llm: LLM) -> None:
    session = tiny_llm.session(SnapKV(kv_len=30))
    session.add(ids(100))
    before = session.fork().generate(ids(10, 1), PARAMS).token_ids
    session.generate(ids(60, 2), PARAMS, compress=True)  # chooses anew among all of it
    session.generate(ids(9, 3), PARAMS)
    session.undo()
    assert len(session.ids) == 100 + 60 + 6
    session.undo()
    assert session.generate(ids(10, 1), PARAMS).token_ids == before
    session.undo()
    session.undo()
    assert (session.ids, session.kv_bytes) == ([], 0)
    with pytest.raises(FastKVError, match="no turn to undo"):
        session.undo()


def test_only_where_asked_is_a_later_turn_compressed(tiny_llm: LLM) -> None:
    entries = []
    for compress in (None, True):
        session = tiny_llm.session(SnapKV(kv_len=30))
        session.add(ids(100))
        session.generate(ids(60, 1), PARAMS, compress=compress)
        entries.append(session.kv_entries // 12)
    assert entries == [30 + 60 + 5, 30 + 5]


# --- several at once ---


def test_sessions_decode_together_beside_prompts(tiny_llm: LLM) -> None:
    """Each gets what it gets alone, in layouts of their own or in one that all can be stored in."""
    sessions = [tiny_llm.session(policy) for policy in (*DROPPING, FullKV())]
    for index, session in enumerate(sessions):
        session.add(ids(100 + 9 * index, index))
    questions = [ids(8 + index, 20 + index) for index in range(len(sessions))]
    alone = [session.fork().generate(asked, PARAMS) for session, asked in zip(sessions, questions, strict=True)]
    asked: list[Any] = [session.turn(question) for session, question in zip(sessions, questions, strict=True)]
    asked.insert(1, ids(70, 9))
    together = tiny_llm.generate(asked, PARAMS, SnapKV(kv_len=20), batch_size=3)
    plain = together.pop(1)
    assert [out.token_ids for out in together] == [out.token_ids for out in alone]
    assert plain.token_ids == tokens_of(tiny_llm, ids(70, 9), SnapKV(kv_len=20))
    for session, question, output in zip(sessions, questions, together, strict=True):
        assert session.ids[-len(question) - len(output.token_ids) :] == question + output.token_ids
        assert output.run.policy == session.policy.name


@pytest.mark.parametrize("policy", [DROPPING[0], DROPPING[-1]], ids=[NAMES[0], NAMES[-1]])
def test_many_questions_of_one_session_that_stays_as_it_is(tiny_llm: LLM, policy: Policy) -> None:
    """In one list, or as a stream while another one runs; nothing is copied for what nobody goes on from."""
    session = tiny_llm.session(policy)
    session.add(ids(150))
    before, questions = session._held, [ids(10, 1), ids(14, 2), ids(10, 1)]
    expected = [session.fork().generate(question, PARAMS).token_ids for question in questions]
    asked = [session.turn(question, keep=False) for question in questions]
    outputs = tiny_llm.generate([*asked, session.turn(ids(5, 9), keep=False)], PARAMS, batch_size=2)
    assert [output.token_ids for output in outputs[:3]] == expected
    assert session._held is before
    running = session.stream(ids(9, 3), PARAMS)
    next(running)
    assert tiny_llm.generate(asked[1], PARAMS).token_ids == expected[1]
    running.close()
    with pytest.raises(FastKVError, match="keep must be True or False, not 1"):
        session.turn(ids(3), keep=1)  # type: ignore[arg-type]


def test_a_question_that_is_not_kept_takes_no_snapshot(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    session = tiny_llm.session(SnapKV(kv_len=30))
    session.add(ids(100))
    monkeypatch.setattr(KVCache, "snapshot", lambda cache: pytest.fail("one was taken"))
    assert len(tiny_llm.generate(session.turn(ids(9, 1), keep=False), PARAMS).token_ids) == 6


def test_one_session_runs_one_turn_at_a_time(tiny_llm: LLM) -> None:
    session = tiny_llm.session(FullKV())
    session.add(ids(30))
    with pytest.raises(FastKVError, match=r"prompt 2 of the list: prompt 0 is a turn of the same session; fork it"):
        tiny_llm.generate([session.turn(ids(3)), ids(4), session.turn(ids(5))], PARAMS)
    running, late, later = (session.stream(ids(count), PARAMS) for count in (3, 4, 5))
    next(running)
    for attempt in (lambda: next(late), lambda: session.rewind(1), session.undo):
        with pytest.raises(FastKVError, match="a turn of this session is running"):
            attempt()
    running.close()
    with pytest.raises(FastKVError, match="the session has gone on since this turn was made"):
        next(later)
    assert session.ids == ids(30) + ids(3) + running.output().token_ids


def test_a_turn_runs_on_the_model_of_its_session_only(tiny_llm: LLM, archive_llm: LLM) -> None:
    """Entries of another model, even of the same shape, would give tokens that mean nothing."""
    session = tiny_llm.session(FullKV())
    session.add(ids(30))
    message = r"of a session of another LLM, .*: give it to that one; Session\.save and load_session"
    with pytest.raises(FastKVError, match=message):
        archive_llm.generate(session.turn(ids(3)), PARAMS)
    with pytest.raises(FastKVError, match=f"prompt 1 of the list: .*{message}"):
        archive_llm.generate([ids(3), session.turn(ids(3), keep=False)], PARAMS)
    assert len(session.generate(ids(3), PARAMS).token_ids) == 6


# --- turns that end early, or fail ---


def test_a_stream_that_is_forgotten_has_changed_nothing(tiny_llm: LLM) -> None:
    """Who leaves a loop over session.stream has nothing to close."""
    session = tiny_llm.session(FullKV())
    session.add(ids(40))
    for _ in session.stream(ids(9, 1), PARAMS):
        break
    assert session.ids == ids(40)
    assert session.generate(ids(9, 1), PARAMS).token_ids == tokens_of(tiny_llm, ids(40) + ids(9, 1), FullKV())


def test_a_turn_that_is_left_early_keeps_what_came(tiny_llm: LLM) -> None:
    session = tiny_llm.session(FullKV())
    session.add(ids(40))
    whole = session.fork().generate(ids(9, 1), PARAMS).token_ids
    stream = session.stream(ids(9, 1), PARAMS)
    pieces = [next(stream).token_id for _ in range(3)]
    stream.close()
    assert session.ids == ids(40) + ids(9, 1) + pieces
    more = session.generate(whole[3:4], SamplingParams(max_tokens=2, ignore_eos=True)).token_ids
    assert pieces + whole[3:4] + more == whole
    unread = session.stream(ids(9, 1), PARAMS)
    before = session.ids
    unread.close()
    assert session.ids == before


@pytest.mark.parametrize("at", ["prefill", "step"])
def test_a_turn_that_fails_changes_nothing(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    session = tiny_llm.session(SnapKV(kv_len=30))
    session.add(ids(100))
    expected, before = session.fork().generate(ids(9, 1), PARAMS).token_ids, session.ids

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("lost")

    with monkeypatch.context() as patched:
        if at == "prefill":
            patched.setattr(decode_batch, "prefill", fails)
        else:
            patched.setattr(decode_batch.DecodeBatch, "_step", fails)
        for attempt in _ways_to_ask(tiny_llm, session):
            with pytest.raises(RuntimeError, match="lost"):
                attempt()
            assert session.ids == before
    assert session.generate(ids(9, 1), PARAMS).token_ids == expected


def _ways_to_ask(llm: LLM, session: Session) -> list[Callable[[], object]]:
    return [
        lambda: session.generate(ids(9, 1), PARAMS),
        lambda: llm.generate([session.turn(ids(9, 1)), ids(20)], PARAMS),
    ]


def test_a_turn_that_does_not_fit_changes_nothing(tiny_llm: LLM) -> None:
    session, limit = tiny_llm.session(SnapKV(kv_len=30)), tiny_llm.config.context_length
    session.add(ids(100))
    room = limit - 100
    with pytest.raises(FastKVError, match=f"has {room + 1} tokens after the 100 before them, but the model's"):
        session.generate(ids(room + 1), PARAMS)
    with pytest.raises(FastKVError, match=f"the prompt has {room} tokens after the 100 before them and fills"):
        session.generate(ids(room), PARAMS)
    with pytest.raises(FastKVError, match=f"max_tokens must be at most {room - 9}, not {room}: .* after the 100"):
        session.generate(ids(9), SamplingParams(max_tokens=room))
    with pytest.raises(FastKVError, match="the prompt is empty"):
        session.add([])
    assert session.ids == ids(100)
    assert len(session.generate(ids(9), PARAMS).token_ids) == 6


def test_memory_is_asked_for_the_slot_and_for_what_the_session_keeps(
    tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastkv.engine import checked as module

    asked: list[int] = []
    real = module.footprint

    def noted(model: Any, plan: Any, cache: int, *rest: Any, **named: Any) -> Any:
        asked.append(cache)
        return real(model, plan, cache, *rest, **named)

    monkeypatch.setattr(module, "footprint", noted)
    tiny_llm.generate(ids(64), PARAMS, FullKV())
    tiny_llm.session(FullKV()).generate(ids(64), PARAMS)
    assert asked[1] > 1.9 * asked[0]


# --- what is refused ---


def test_what_a_session_cannot_be(tiny_llm: LLM) -> None:
    session = tiny_llm.session()
    turn = session.turn(ids(5))
    with pytest.raises(FastKVError, match="a turn goes by its session's policy: leave policy out"):
        tiny_llm.generate(turn, PARAMS, FullKV())
    with pytest.raises(FastKVError, match="compress must be True or False, not 1"):
        session.turn(ids(5), compress=1)  # type: ignore[arg-type]
    with pytest.raises(FastKVError, match="no tokenizer"):
        session.generate("text")
    assert isinstance(turn, Turn)


def test_figures_count_what_was_there(tiny_llm: LLM) -> None:
    """Attention that was lost with earlier tokens cannot be measured any more, so nothing is claimed."""
    session = tiny_llm.session(SnapKV(kv_len=30))
    read = session.add(ids(100))
    assert (read.prompt_tokens, read.new_tokens, read.kv_tokens, read.reused_tokens) == (100, 0, 30, 0)
    assert read.ttft_s > 0
    metrics = session.generate(ids(10, 1), PARAMS).metrics
    assert (metrics.prompt_tokens, metrics.reused_tokens) == (10, 100)
    assert (metrics.kv_entries, metrics.kv_full_entries) == (40 * 12, 110 * 12)
    assert metrics.attention_kept is None
    assert tiny_llm.session(FullKV()).generate(ids(10), PARAMS).metrics.attention_kept == 1


# --- texts and chats ---


def test_a_chat_is_always_one_rendering(chatting: LLM) -> None:
    """Whatever the answers were: the session's tokens are those that the template makes of all its messages."""
    session = chatting.session(FullKV(), system="Be short.")
    for message in ("one", "two", "three"):
        before = [dict(each) for each in session.messages]
        output = session.chat(message, SamplingParams(max_tokens=5))
        rendered = chatting.chat([*before, {"role": "user", "content": message}])
        assert session.ids[: len(rendered)] == rendered
        assert session.ids[len(rendered) :] == output.token_ids
        assert output.token_ids == chatting.generate(rendered, SamplingParams(max_tokens=5), FullKV()).token_ids
    assert [each["role"] for each in session.messages] == ["system", *["user", "assistant"] * 3]
    session.undo()
    assert session.messages == before
    session.rewind(1)
    assert session.messages == before[:-2]  # half a turn is no message


def test_a_chat_whose_compressed_part_would_change_begins_anew(chatting: LLM) -> None:
    session = chatting.session(SnapKV(kv_len=16), system="Be short.")
    session.chat("one two three four five six", SamplingParams(max_tokens=5))
    session.messages[0]["content"] = "Be long."
    output = session.chat("two", SamplingParams(max_tokens=5))
    assert output.metrics.reused_tokens == 0
    assert session.ids[: -len(output.token_ids)] == chatting.chat(session.messages[:-1])


@pytest.mark.parametrize("document", ["The access code of the old mill is 1111.", "One line.\n", "a"])
def test_a_document_in_a_chat_is_one_message_with_its_question(chatting: LLM, document: str) -> None:
    """Read before the question is known, it is token for token what one rendering of both would be."""
    session = chatting.session(FullKV(), system="Be short.")
    session.chat_add(f"{document}\n\n")
    read = session.ids
    assert session.messages[1:] == [{"role": "user", "content": f"{document}\n\n"}]
    for question in ("Where?", " Where?", "\nWhere?", "1"):
        asked = [session.messages[0], {"role": "user", "content": f"{document}\n\n{question}"}]
        expected = chatting.chat(asked)
        fork = session.fork()
        output = fork.chat(question, SamplingParams(max_tokens=3))
        assert fork.ids == expected + output.token_ids
        assert output.metrics.reused_tokens == len(read)
        assert fork.messages == [*asked, {"role": "assistant", "content": output.text}]
        fork.undo()
        assert (fork.messages, fork.ids) == (session.messages, read)
    session.chat_add("More.")
    assert session.messages[1]["content"] == f"{document}\n\nMore."
    session.undo()
    session.undo()
    assert (session.messages, session.ids) == ([{"role": "system", "content": "Be short."}], [])


def test_only_the_text_that_begins_gets_a_bos(archive_llm: LLM) -> None:
    tokenizer = archive_llm.tokenizer
    assert tokenizer is not None
    session = archive_llm.session(FullKV())
    session.add("The calm owl")
    assert session.ids == tokenizer.encode("The calm owl")
    session.add(" keeps a code.")
    assert session.ids == [*tokenizer.encode("The calm owl"), *tokenizer.encode(" keeps a code.")[1:]]
    stream = session.stream(" The", PARAMS)
    assert "".join(piece.text for piece in stream) == stream.output().text


@pytest.mark.parametrize("place", ["cache_in", "prefilled", "stop"])
def test_an_interrupt_between_two_lines_leaves_model_and_session_usable(
    tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """A slot that was taken and is nobody's, or was not handed back, is not what the next request is given."""
    session = tiny_llm.session(FullKV())
    session.add(ids(40))
    expected = session.fork().generate(ids(9, 1), PARAMS).token_ids
    owner = {"cache_in": RequestPlan, "prefilled": Answer, "stop": Sampler}[place]

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(owner, place, interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.fork().generate(ids(9, 1), PARAMS)
        with pytest.raises(KeyboardInterrupt) as told:
            session.generate(ids(9, 1), PARAMS)
    assert told.tb is not None  # a prompt of Python keeps the last error, too, and what hangs on it
    if place == "stop":  # the answer was there already
        assert session.ids[:49] == ids(40) + ids(9, 1)
        session.undo()
    assert session.generate(ids(9, 1), PARAMS).token_ids == expected


@pytest.mark.parametrize("policy", [FullKV(), AdaKV(kv_len=30)], ids=["full", "heads differ"])
def test_an_interrupt_while_a_step_is_counted_costs_no_token(
    tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch, policy: Policy
) -> None:
    session = tiny_llm.session(policy)
    session.add(ids(70))
    other, real, calls = session.fork(), KVPool.advance, list[int]()

    def interrupted(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(KVPool, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.generate(ids(9, 1), PARAMS)
    other.generate(ids(9, 1), SamplingParams(max_tokens=3, ignore_eos=True))
    assert session.ids == other.ids
    assert session.generate(ids(5, 2), PARAMS).token_ids == other.generate(ids(5, 2), PARAMS).token_ids
