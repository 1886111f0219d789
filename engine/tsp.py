"""The tokens on their way through the layers: ids, hidden states and positions are gathered together or not at all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenState:
    """T tokens of B prompts: ids int64 [B, T], hidden [B, T, E], positions int64 [B, T] (original, ascending).

    The network itself reads no ids; they say which tokens these are.
    """

    ids: Tensor
    hidden: Tensor
    positions: Tensor

    @classmethod
    def start(cls, ids: Tensor, hidden: Tensor, position: int = 0) -> TokenState:
        """All N tokens, at positions position … position + N - 1."""
        return cls(ids, hidden, torch.arange(position, position + ids.shape[1], device=ids.device).expand_as(ids))

    def take(self, keep: Tensor, out: Tensor | None = None) -> TokenState:
        """Token-Selective Propagation (arXiv 2502.01068): only the tokens at `keep`, int64 [B, n], are propagated.

        Their hidden states go into `out` [B, n, E], if there is one.
        """
        index = keep.unsqueeze(-1).expand(-1, -1, self.hidden.shape[-1])
        hidden = torch.gather(self.hidden, 1, index, out=out)
        return TokenState(self.ids.gather(1, keep), hidden, self.positions.gather(1, keep))

    def last_token(self) -> Tensor:
        """Where the last token stands, for `take`: int64 [B, 1]."""
        return torch.full_like(self.ids[:, :1], self.ids.shape[1] - 1)
