"""Memory for a prefill's activations, by name."""

from __future__ import annotations

import torch

from fastkv.engine.workspace import Workspace


def test_a_workspace_grows_and_never_shrinks() -> None:
    workspace, like = Workspace(), torch.empty(0, dtype=torch.bfloat16)
    first = workspace.take("a", (2, 3), like)
    assert first.shape == (2, 3)
    assert first.dtype == torch.bfloat16
    assert workspace.take("a", (3,), like).data_ptr() == first.data_ptr()
    assert workspace.nbytes == 12
    assert workspace.take("a", (7,), like).shape == (7,)
    assert workspace.take("b", (1,), like).data_ptr() != first.data_ptr()
    assert workspace.nbytes == 16
