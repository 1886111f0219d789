"""fastkv-eval compare: every policy there is, at equal kept bytes, on the same questions."""
