"""A context that is read under a policy, and questions that come later: each is kept whole, and can be taken back."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from fastkv.cache.policy import Policy
from fastkv.engine.llm import LLM
from fastkv.engine.output import Output
from fastkv.engine.sampler import SamplingParams


class Conversation:
    """A session that begins with a context, compressed once. What comes after it is kept whole under every policy.

    context: token ids. context_s: seconds that reading them took. Raises FastKVError as `Session.add` does.
    """

    def __init__(self, llm: LLM, policy: Policy, context: list[int]) -> None:
        self._session = llm.session(policy)
        self.context_s = self._session.add(context).ttft_s

    @property
    def position(self) -> int:
        """Tokens so far, whether they are kept or not."""
        return len(self._session.ids)

    def add(self, ids: list[int]) -> None:
        """Go on with these tokens, all of which are kept."""
        self._session.add(ids, compress=False)

    def ask(self, ids: list[int], max_tokens: int, ends: Collection[int] = ()) -> Output:
        """Go on with a question, and answer it greedily. ends: ids that end the answer, besides the model's own.

        The figures are those of a request whose prompt is all that stands before the answer; its first token is timed
        from the question on. attention_kept is None where the context was compressed: nobody measures what the question
        would have attended to.
        """
        output = self._session.generate(ids, SamplingParams(max_tokens=max_tokens, stop_token_ids=tuple(ends)))
        before = output.metrics.prompt_tokens + output.metrics.reused_tokens
        return replace(output, metrics=replace(output.metrics, prompt_tokens=before))

    def rewind(self, position: int) -> None:
        """Forget what came after the first `position` tokens, as if it had never been; not into the context."""
        self._session.rewind(self.position - position)
