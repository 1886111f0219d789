"""fastkv-eval turns: several questions about one text that was read once, after SCBench (arXiv 2412.10319)."""
