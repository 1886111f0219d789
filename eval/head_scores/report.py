"""The retrieval scores of a model's heads, as a table for people."""

from __future__ import annotations

from fastkv.eval.head_scores.retrieval import HeadScores
from fastkv.eval.table import markdown

SHOWN = 10  # rows of the table, at most
RETRIEVAL_HEAD = 0.1  # a query head with a score above this is a retrieval head in arXiv 2404.15574
FEW = 0.5  # of the copied tokens
TOO_FEW = "A model that chooses so few of them itself hardly shows how it copies: take shorter texts or another task.\n"


def table(scores: HeadScores) -> str:
    """The KV heads with the highest scores, highest first, and how much of all scores is theirs: some are above 0."""
    n_kv_heads = scores.kv_heads.shape[1]
    flat = scores.kv_heads.flatten()
    order = flat.argsort(descending=True, stable=True).tolist()
    of_groups = scores.query_heads.unflatten(1, (n_kv_heads, -1)).flatten(0, 1).tolist()  # [L * Hkv][G]
    rows = [
        [
            *map(str, divmod(head, n_kv_heads)),
            f"{flat[head]:.3f}",
            " ".join(f"{score:.3f}" for score in of_groups[head]),
            f"{100 * flat[order[: rank + 1]].sum() / flat.sum():.1f} %",
        ]
        for rank, head in enumerate(order[:SHOWN])
        if flat[head] > 0
    ]
    retrieval = int((scores.query_heads > RETRIEVAL_HEAD).sum())
    nothing = int((flat == 0).sum())
    return (
        f"{markdown(['layer', 'KV head', 'score', 'of its query heads', 'of all scores, up to here'], rows)}\n"
        "score: the share of the copied tokens to which a head attended more than to any other token, while they were\n"
        "being copied; of a KV head the mean over its query heads. Means over the examples.\n"
        f"Of {scores.query_heads.numel()} query heads {retrieval} have a score above {RETRIEVAL_HEAD}; "
        f"of {len(flat)} KV heads {nothing} have none.\n"
        f"Given those before it, {100 * scores.predicted:.1f} % of these tokens were the model's own choice.\n"
        + (TOO_FEW if scores.predicted < FEW else "")
    )
