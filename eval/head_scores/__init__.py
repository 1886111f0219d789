"""fastkv-eval head-scores: which heads copy from the prompt? The table that policy headkv reads."""
