"""Sessions on disk: what comes back in another process, the size of a file, what is refused, and full disks."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from fastkv import LLM, AdaKV, DefensiveKVLayer, FastKV, FastKVError, FullKV, HeadKV, SamplingParams, Session, SnapKV
from fastkv.cache.layer import KVLayer
from fastkv.cache.per_head import PerHeadLayer
from fastkv.cache.policy import Policy
from fastkv.engine import tensor_file
from fastkv.engine.fingerprint import fingerprint
from fastkv.engine.tensor_file import TensorFile, write_tensors
from fastkv.errors import FaultError

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)
SHORT = SamplingParams(max_tokens=5)
POLICIES = [FullKV(), FastKV(min_tokens=8), AdaKV(kv_len=30), DefensiveKVLayer(kv_len=30)]
NAMES = [policy.name for policy in POLICIES]
TABLE = ((1.0, 2.0),) * 6


def ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def session_of(llm: LLM, policy: Policy, count: int = 150) -> Session:
    """One that has read, was asked, and waits for its next turn."""
    session = llm.session(policy)
    session.add(ids(count))
    session.generate(ids(9, 1), PARAMS)
    return session


def asked(session: Session) -> list[int]:
    return session.fork().generate(ids(12, 2), PARAMS).token_ids


@pytest.fixture(scope="module")
def chatting(archive_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """The bundled model with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(archive_folder, folder)
    each = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (folder / "chat_template.jinja").write_text(f"{each}{{% if add_generation_prompt %}}assistant: {{% endif %}}")
    return LLM(folder, dtype="float32", device="cpu")


@pytest.fixture
def saved(tiny_llm: LLM, tmp_path: Path) -> Path:
    path = tmp_path / "one.session"
    session_of(tiny_llm, SnapKV(kv_len=30)).save(path)
    return path


def rewritten(path: Path, change: Callable[[dict[str, str], dict[str, Any], dict[str, Tensor]], None]) -> None:
    """Let the file say something else, with a checksum that is right."""
    file = TensorFile(path)
    places = {name: file._places[name] for name in file.names}
    tensors = {
        name: file.tensor(name, places[name][0], len(places[name][1])) for name in file._places if name in places
    }
    metadata, told = dict(file.metadata), json.loads(file.metadata["session"])
    change(metadata, told, tensors)
    if "session" in metadata:
        metadata["session"] = json.dumps(told)
    with path.with_suffix(".new").open("wb") as new:
        write_tensors(new, metadata, tensors)
    path.with_suffix(".new").replace(path)


# --- what comes back ---

ELSEWHERE = """
import json, resource, sys
from pathlib import Path
from fastkv import LLM, FastKVError, SamplingParams
asked = json.loads(sys.stdin.read())
llm = LLM(asked["model"], dtype="float32", device="cpu")
params = SamplingParams(max_tokens=6, ignore_eos=True)
answers = {}
for name in asked["sessions"]:
    session = llm.load_session(Path(asked["folder"], name))
    answers[name] = [session.policy.name, session.generate(asked["question"], params).token_ids]
    answers[name].append(session.generate(asked["question"], params).token_ids)
session = llm.load_session(Path(asked["folder"], "chat"))
answers["chat"] = [session.chat("three", SamplingParams(max_tokens=5)).token_ids, session.messages]
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    session.save(Path(asked["folder"], "full"))
except FastKVError as error:
    answers["refused"] = str(error)
print(json.dumps(answers))
"""


def test_another_process_gives_the_same_tokens(chatting: LLM, tmp_path: Path) -> None:
    """Of every layout, and of a chat; and a disk that is full there leaves the file that this process wrote."""
    shutil.copytree(chatting._folder, tmp_path / "moved")
    sessions = {policy.name: session_of(chatting, policy) for policy in POLICIES}
    chat = chatting.session(SnapKV(kv_len=40), system="Be short.")
    for message in ("one", "two"):
        chat.chat(message, SHORT)
    for name, session in (*sessions.items(), ("chat", chat)):
        session.save(tmp_path / name)
    earlier, before = (tmp_path / "full").read_bytes(), sorted(tmp_path.iterdir())
    told = {"model": str(tmp_path / "moved"), "folder": str(tmp_path), "sessions": NAMES, "question": ids(12, 2)}
    command = [sys.executable, "-c", ELSEWHERE]
    run = subprocess.run(command, input=json.dumps(told), capture_output=True, text=True, check=True)
    answers = json.loads(run.stdout)
    for name, session in sessions.items():
        first = session.generate(ids(12, 2), PARAMS).token_ids
        assert answers[name] == [name, first, session.generate(ids(12, 2), PARAMS).token_ids]
    assert answers["chat"] == [chat.chat("three", SHORT).token_ids, chat.messages]
    assert answers["refused"] == f"{tmp_path / 'full'}: cannot be written (File too large)"
    assert (tmp_path / "full").read_bytes() == earlier
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("policy", [*POLICIES, HeadKV(head_scores=TABLE, kv_len=30)], ids=[*NAMES, "headkv"])
def test_all_of_a_session_comes_back(tiny_llm: LLM, tmp_path: Path, policy: Policy) -> None:
    session = session_of(tiny_llm, policy)
    session.generate(ids(40, 3), PARAMS, compress=True)
    session.save(tmp_path / "file")
    loaded = tiny_llm.load_session(str(tmp_path / "file"))
    assert (loaded.ids, loaded.policy, loaded.messages) == (session.ids, policy, [])
    one, other = session._held.snapshot, loaded._held.snapshot
    assert one is not None
    assert other is not None
    for name in ("layout", "shape", "longest", "entries", "position", "whole_from"):
        assert getattr(one, name) == getattr(other, name)
    for here, there in zip(one.layers, other.layers, strict=True):
        assert here.keys() == there.keys()
        assert all(torch.equal(here[name], there[name]) for name in here)
    for mine, its in zip(one.chosen, other.chosen, strict=True):
        assert (mine is None and its is None) or torch.equal(mine, its)  # type: ignore[arg-type]
    assert asked(loaded) == asked(session)
    size = (tmp_path / "file").stat().st_size
    chosen = sum(0 if each is None else each.numel() for each in one.chosen)
    assert size <= session.kv_bytes + 2 * chosen + 5 * 12 + len(session.ids) + 4096  # 4096: the header
    with safe_open(tmp_path / "file", "pt") as plain:  # as anybody else reads it
        assert torch.equal(plain.get_tensor("layers.5.v"), one.layers[5]["v"])
    loaded.rewind(5)
    session.rewind(5)
    assert asked(loaded) == asked(session)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_entries_of_two_bytes(tiny_folder: Path, tmp_path: Path, dtype: str) -> None:
    llm = LLM(tiny_folder, dtype=dtype, device="cpu")
    session = session_of(llm, SnapKV(kv_len=31))
    session.save(tmp_path / "file")
    assert asked(llm.load_session(tmp_path / "file")) == asked(session)


def test_a_session_that_has_read_nothing(tiny_llm: LLM, tmp_path: Path) -> None:
    tiny_llm.session(SnapKV(kv_len=30), system="Be short.").save(tmp_path / "file")
    loaded = tiny_llm.load_session(tmp_path / "file")
    assert (loaded.ids, loaded.kv_bytes) == ([], 0)
    assert loaded.messages == [{"role": "system", "content": "Be short."}]
    assert (
        loaded.generate(ids(50), PARAMS).token_ids
        == tiny_llm.session(SnapKV(kv_len=30)).generate(ids(50), PARAMS).token_ids
    )


# --- several at one file ---


def test_a_loaded_session_needs_its_file_no_more(tiny_llm: LLM, saved: Path) -> None:
    loaded = tiny_llm.load_session(saved)
    expected = asked(loaded)
    session_of(tiny_llm, FullKV(), 60).save(saved)
    assert asked(loaded) == expected
    loaded.save(saved)  # in the place of what it is not mapped from any more
    assert asked(tiny_llm.load_session(saved)) == expected
    saved.unlink()
    assert asked(loaded) == expected


def test_of_several_that_save_one_file_each_is_there_whole(tiny_llm: LLM, tmp_path: Path) -> None:
    sessions = [session_of(tiny_llm, FullKV(), 40 + 30 * each) for each in range(3)]
    path, failed, known = tmp_path / "file", [], [session.ids for session in sessions]
    sessions[0].save(path)

    def work(session: Session) -> None:
        try:
            for _ in range(8):
                session.save(path)
                assert tiny_llm.load_session(path).ids in known
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(session,)) for session in sessions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert list(tmp_path.iterdir()) == [path]


# --- saving that fails ---


def test_a_full_disk_leaves_the_earlier_file(tiny_llm: LLM, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier, real, written = saved.read_bytes(), tensor_file._flush, []

    def full(*arguments: Any) -> None:
        real(*arguments)
        written.append(1)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensor_file, "_flush", full)
    monkeypatch.setattr(tensor_file, "_BUFFER", tensor_file._BLOCK)
    with pytest.raises(FaultError, match=r"one\.session: cannot be written \(No space left on device\)") as failed:
        session_of(tiny_llm, FullKV(), 400).save(saved)
    assert failed.value.setting == "save_cache"
    assert saved.read_bytes() == earlier
    assert list(saved.parent.iterdir()) == [saved]


@dataclass(frozen=True, kw_only=True)
class Mine(SnapKV):
    name: ClassVar[str] = "mine"


@dataclass(frozen=True, kw_only=True)
class Twin(SnapKV):
    """With the name of another one."""

    name: ClassVar[str] = "snapkv"


class OwnLayer(PerHeadLayer):
    pass


@dataclass(frozen=True, kw_only=True)
class Own(AdaKV):
    layout: ClassVar[type[KVLayer] | None] = OwnLayer


def test_what_cannot_be_saved(tiny_llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for policy in (Mine(kv_len=30), Twin(kv_len=30)):
        message = f"file: the session cannot be saved: policy {type(policy).__name__} cannot be kept in a file: only"
        with pytest.raises(FastKVError, match=message) as failed:
            session_of(tiny_llm, policy, 60).save(tmp_path / "file")
        assert failed.value.setting == "save_cache"
    session = session_of(tiny_llm, Own(kv_len=30), 60)
    session.policy = AdaKV(kv_len=30)
    with pytest.raises(FastKVError, match="in the layout OwnLayer"):
        session.save(tmp_path / "file")
    session = session_of(tiny_llm, FullKV(), 60)
    session.messages.append({"role": 3})  # type: ignore[dict-item]
    with pytest.raises(FastKVError, match="its messages must be dicts of texts"):
        session.save(tmp_path / "file")
    session.messages.clear()
    os.mkfifo(tmp_path / "pipe")
    for wrong, what in (
        (3, "named by a path, not 3"),
        ("", "named by a path"),
        ("a\0b", "named by a path"),
        (tmp_path, "no ordinary file"),
        (tmp_path / "pipe", "no ordinary file"),
        (tmp_path / "no" / "file", r"cannot be written \(No such file or directory\)"),
        (tmp_path / ("x" * 300), r"cannot be written \(File name too long\)"),
    ):
        with pytest.raises(FastKVError, match=what) as failed:
            session.save(wrong)  # type: ignore[arg-type]
        assert failed.value.setting == "save_cache"
    stream = session.stream(ids(9, 1), PARAMS)
    next(stream)
    with pytest.raises(FastKVError, match="a turn of this session is running"):
        session.save(tmp_path / "file")
    stream.close()
    assert [each.name for each in tmp_path.iterdir()] == ["pipe"]


# --- files that are refused ---


def test_what_is_no_file_of_a_session(tiny_llm: LLM, tiny_folder: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("A letter. " * 100)
    shutil.copy(tiny_folder / "model.safetensors", tmp_path / "weights")
    with (tmp_path / "other").open("wb") as other:
        write_tensors(other, {"format": "pt"}, {})
    for name, what in (
        ("pipe", "no ordinary file"),
        ("absent", r"cannot be read \(No such file or directory\)"),
        ("", "no ordinary file"),
        ("empty", "is no safetensors file"),
        ("text", "is no session file"),
        ("weights", "is no session file"),
        ("other", "is no session file"),
    ):
        with pytest.raises(FastKVError, match=what) as failed:
            tiny_llm.load_session(tmp_path / name)
        assert failed.value.setting == "cache"
        assert str(tmp_path / name) in str(failed.value)
    with pytest.raises(FastKVError, match="named by a path"):
        tiny_llm.load_session("a\0b")


def changed_model(folder: Path, to: Path, **config: Any) -> Path:
    shutil.copytree(folder, to)
    content = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(content | config))
    return to


def test_a_session_is_of_one_model_loaded_in_one_way(
    tiny_llm: LLM, tiny_folder: Path, archive_llm: LLM, saved: Path, tmp_path: Path
) -> None:
    shorter = changed_model(tiny_folder, tmp_path / "shorter", max_position_embeddings=160)
    turned = changed_model(tiny_folder, tmp_path / "turned", rope_theta=10_000.0)
    for other, what in (
        (LLM(tiny_folder, dtype="bfloat16", device="cpu"), "'float32', and this model computes in bfloat16.*--dtype"),
        (LLM(tiny_folder, dtype="float32", device="cpu", weights="int8"), "without int8 weights.*leave --weights out"),
        (archive_llm, "of another model: that one has 6 layers of 2 KV heads with 16 values, this one"),
        (LLM(turned, dtype="float32", device="cpu"), "of another model: the fingerprint"),
        (LLM(shorter, dtype="float32", device="cpu"), "has 165 tokens, and the model's context is 160"),
    ):
        with pytest.raises(FastKVError, match=what) as failed:
            other.load_session(saved)
        assert str(saved) in str(failed.value)
    int8 = LLM(tiny_folder, dtype="float32", device="cpu", weights="int8")
    session = session_of(int8, SnapKV(kv_len=30))
    session.save(saved)
    assert asked(int8.load_session(saved)) == asked(session)
    with pytest.raises(FastKVError, match=r"with int8 weights, and .* without int8 weights: load .* --weights int8"):
        tiny_llm.load_session(saved)


def test_a_fingerprint_is_of_what_a_model_computes(tiny_llm: LLM, tiny_folder: Path) -> None:
    other = LLM(tiny_folder, dtype="float32", device="cpu")
    own = fingerprint(tiny_llm.model)
    assert fingerprint(other.model) == own
    seen = {own}
    for parameter in other.model.parameters():  # whichever one a fine-tune changes
        parameter.data += 0.001
        seen.add(fingerprint(other.model))
    assert len(seen) == 1 + len(list(other.model.parameters()))
    random = [fingerprint(LLM(tiny_folder, load_format="dummy", device="cpu").model) for _ in range(2)]
    assert random[0] == random[1] != own


def test_no_byte_can_be_changed(tiny_llm: LLM, saved: Path) -> None:
    whole = saved.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    file = TensorFile(saved)
    begin = {name: header + file._places[name][2] for name in file._places}
    small = [
        place + step
        for name in ("ids", "messages", "checksum", "layers.3.positions")
        for place in (begin[name],)
        for step in (0, 1)
    ]
    for place in (*range(9), *range(9, header, 31), *small, *range(header, len(whole), 4001), len(whole) - 1):
        changed = bytearray(whole)
        changed[place] ^= 0x10
        saved.write_bytes(changed)
        with pytest.raises(FastKVError, match=r"one\.session: "):
            tiny_llm.load_session(saved)
    saved.write_bytes(whole)
    tiny_llm.load_session(saved)


def test_a_file_that_is_not_whole(tiny_llm: LLM, saved: Path) -> None:
    whole = saved.read_bytes()
    for end in (7, 8, 100, 3000, 20_000, len(whole) - 33, len(whole) - 1):
        saved.write_bytes(whole[:end])
        with pytest.raises(FastKVError, match=r"is cut off|is no safetensors file"):
            tiny_llm.load_session(saved)
    saved.write_bytes(whole + b"x")
    with pytest.raises(FastKVError, match="written to after it was whole"):
        tiny_llm.load_session(saved)


def test_a_version_that_is_not_known(tiny_llm: LLM, saved: Path) -> None:
    rewritten(saved, lambda metadata, *_: metadata.update(version="2", fastkv="9.0"))
    with pytest.raises(
        FastKVError, match=r"version '2', and this fastkv reads version '1': load it with the one.*'9.0'"
    ):
        tiny_llm.load_session(saved)


ODD: list[Any] = [None, True, -1, 0, 1, 10**6, 2**70, 1.5, "", "x", [], [1], {}]


@pytest.mark.parametrize(
    "name", ["model", "dtype", "weights", "layers", "policy", "layout", "position", "whole_from", "fed"]
)
def test_what_a_file_may_claim(tiny_llm: LLM, saved: Path, tmp_path: Path, name: str) -> None:
    """Somebody made it, with the right checksum: it is refused in one line, or is what it was."""
    for index, odd in enumerate([*ODD, "absent"]):
        path = tmp_path / f"{index}"
        shutil.copy(saved, path)

        def change(_: Any, told: dict[str, Any], __: Any, odd: Any = odd) -> None:
            if odd == "absent":
                del told[name]
            elif told[name] != odd:
                told[name] = odd

        rewritten(path, change)
        if path.read_bytes() != saved.read_bytes():
            with pytest.raises(FastKVError, match=f"{path}: "):
                tiny_llm.load_session(path)


def replace_tensor(name: str, change: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    def apply(_: Any, __: Any, tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name])

    return apply


def text(said: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)


HOSTILE: dict[str, tuple[Callable[..., None], str]] = {
    "entries cut": (replace_tensor("layers.2.k", lambda k: k[:, :-1]), "entries of the shapes"),
    "heads missing": (replace_tensor("layers.2.k", lambda k: k[:1]), "entries of the shapes"),
    "flat": (replace_tensor("layers.2.k", lambda k: k.flatten(0, 1)), "no tensor layers.2.k of 3"),
    "dtype": (replace_tensor("layers.2.v", Tensor.half), "no tensor layers.2.v of 3 dimensions in torch.float32"),
    "positions cut": (replace_tensor("layers.2.positions", lambda each: each[:-1]), "cut off"),
    "positions odd": (replace_tensor("layers.2.positions", lambda each: each.clone().fill_(255)), "no code"),
    "positions gone": (lambda _, __, tensors: tensors.pop("layers.2.positions"), "has no layers.2.positions"),
    "layer gone": (lambda _, __, tensors: tensors.pop("layers.2.k"), "has no tensor layers.2.k"),
    "ids fewer": (replace_tensor("ids", lambda each: each[:-40]), "in a sequence of"),
    "ids none": (replace_tensor("ids", lambda each: each[:0]), "in a sequence of 0"),
    "messages odd": (replace_tensor("messages", lambda _: text([1])), "messages that are none"),
    "messages nested": (replace_tensor("messages", lambda _: text([])[:1].repeat(10**5)), "cannot be"),
    "another tensor": (
        lambda _, __, tensors: tensors.update(more=torch.zeros(3).byte()),
        "tensor more, which no session has",
    ),
    "whole": (lambda _, told, __: told.update(whole_from=told["position"]), "has .* entries at layers.0.k, and"),
    "session": (lambda metadata, *_: metadata.pop("session"), "cannot be"),
    "policy": (lambda _, told, __: told.update(policy={"name": "os", "settings": {}}), "'os' is no policy"),
    "settings": (
        lambda _, told, __: told["policy"]["settings"].update(more=1),
        "'more' is no setting of policy snapkv",
    ),
    "value": (lambda _, told, __: told["policy"]["settings"].update(window=-1), "window must be"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_does_not_add_up(tiny_llm: LLM, saved: Path, case: str) -> None:
    change, what = HOSTILE[case]
    rewritten(saved, change)
    with pytest.raises(FastKVError, match=f"one.session: .*{what}"):
        tiny_llm.load_session(saved)


def test_a_session_names_no_file_to_be_read(tiny_llm: LLM, saved: Path, tmp_path: Path) -> None:
    """headkv takes a table or the name of a file; of a session only the table, for the file may be anything."""
    (tmp_path / "table").write_text(json.dumps({"scores": TABLE}))
    assert HeadKV(head_scores=tmp_path / "table").table == TABLE
    policy = {"name": "headkv", "settings": {"head_scores": str(tmp_path / "table")}}
    rewritten(saved, lambda _, told, __: told.update(policy=policy))
    with pytest.raises(FastKVError, match="head_scores"):
        tiny_llm.load_session(saved)


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "header",
    [
        "",
        "[]",
        "3",
        "{" * 1000,
        '{"a": ' * 100_000,
        json.dumps({"__metadata__": {"format": 3}}),
        json.dumps({"__metadata__": []}),
        *(
            json.dumps({"__metadata__": {"format": "fastkv-session"}, "a": each})
            for each in (
                3,
                entry("F99"),
                entry(["F32"]),
                entry(shape=[-1], offsets=[4, 0]),
                entry(shape=[True]),
                entry(shape=[2**62], offsets=[0, 2**64]),
                entry(shape=[0, 2**40, 2**40], offsets=[0, 0]),
                entry(shape=[1] * 100),
                entry(shape="1"),
                entry(offsets=[4, 8]),
                entry(offsets=[0, 5]),
                entry(offsets=[0]),
                entry(shape=[2**36], offsets=[0, 2**38]),
            )
        ),
        '{"__metadata__": {}, "a": {"shape": [' + "9" * 10_000 + "]}}",
    ],
    ids=lambda header: header[:60],
)
def test_headers_that_lie(tiny_llm: LLM, tmp_path: Path, header: str) -> None:
    data = header.encode()
    data += b" " * (-(8 + len(data)) % 64)
    (tmp_path / "file").write_bytes(len(data).to_bytes(8, "little") + data + bytes(4))
    with pytest.raises(FastKVError, match="file: ") as failed:
        tiny_llm.load_session(tmp_path / "file")
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize("length", [0, 56, 2**24 - 8, 2**40 - 8, 2**64 - 8], ids=str)
def test_lengths_that_lie(tiny_llm: LLM, tmp_path: Path, length: int) -> None:
    (tmp_path / "file").write_bytes(length.to_bytes(8, "little") + b" " * 100)
    with pytest.raises(FastKVError, match="file: is "):
        tiny_llm.load_session(tmp_path / "file")
