"""llama.cpp through the package xllamacpp, in a process of its own: one line of JSON each way.

In its own process, because OpenMP's threads wait less eagerly where a process has more of them than there are CPUs. Two
models of llama.cpp in one process, or torch beside it, slow each other down so, though only one of them works at a time
(decoding by 1.8 times with two models on two CPUs). Between requests the process sleeps.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from fastkv.errors import FaultError

_NOTHING_KEPT = {"cache_prompt": False}  # no request finds what another has left
_GREEDY = {"temperature": 0, "samplers": ["top_k"], "top_k": 1}


class LlamaCpp:
    """A GGUF file loaded by llama.cpp, for one sequence at a time. A context manager: its end ends the process.

    Flash attention is llama.cpp's own choice, its KV cache is F16 (its default), the file is memory-mapped and read
    before the first request. n_ctx: tokens of prompt and answer. ubatch: prompt tokens that go through the layers at a
    time. `about`: {"version", "instructions"}, of the package and its library. Raises FaultError where the file cannot
    be loaded.
    """

    def __init__(self, path: Path, threads: int, n_ctx: int, ubatch: int = 512) -> None:
        settings = {"path": str(path), "threads": threads, "n_ctx": n_ctx, "ubatch": ubatch}
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.about = self._answer()

    def complete(self, ids: Sequence[int], new_tokens: int) -> dict[str, Any]:
        """The times of a greedy request: `prompt_ms` to the first token, `predicted_ms` for the other new_tokens - 1.

        Raises FaultError unless the whole prompt was computed and as many tokens came as were asked for.
        """
        times: dict[str, Any] = self._ask(ids, new_tokens)["timings"]
        done = (times["cache_n"], times["prompt_n"], times["predicted_n"])
        if done != (0, len(ids), new_tokens):
            raise FaultError(f"llama.cpp did not do what it was asked: cached, prompt and new tokens were {done}")
        return times

    def tokens(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        """The greedy continuation of a prompt."""
        (choice,) = self._ask(ids, new_tokens, logprobs=1)["choices"]
        return [each["id"] for each in choice["logprobs"]["content"]]

    def close(self) -> None:
        self._process.kill()  # there is nothing that it could lose
        self._process.communicate()

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, ids: Sequence[int], new_tokens: int, **others: Any) -> dict[str, Any]:
        asked = {"prompt": list(ids), "n_predict": new_tokens, "ignore_eos": True, **_NOTHING_KEPT, **_GREEDY, **others}
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer, which does not come, will say so
        answer = self._answer()
        if "choices" not in answer:
            raise FaultError(f"llama.cpp refused a request: {answer}")
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise FaultError("llama.cpp has stopped; what it said stands above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def serve(settings: dict[str, Any]) -> None:
    """The other side: load the model, say so, and answer until nobody asks any more."""
    import xllamacpp

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who asks decides about the end
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints is no answer
    server = xllamacpp.Server(_params(settings))
    system = xllamacpp.get_system_info()
    on = [name for name, _, value in (part.strip().partition(" = ") for part in system.split("|")) if value == "1"]
    about = {"version": xllamacpp.__version__, "instructions": [name.removeprefix("CPU : ") for name in on]}
    print(json.dumps(about), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(server.handle_completions(json.loads(line))), file=answers, flush=True)


def _params(settings: dict[str, Any]) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = settings["path"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
    params.n_ctx, params.n_parallel = settings["n_ctx"], 1
    params.n_ubatch = settings["ubatch"]
    params.n_batch = max(2048, settings["ubatch"])
    params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_MMAP
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_AUTO
    params.warmup = True
    params.fit_params = False  # or it would choose another context size
    params.cache_prompt, params.cache_ram_mib = False, 0
    params.verbosity = 0
    return params


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
