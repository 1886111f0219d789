"""How operations are computed on this machine: which way is the fastest, and code compiled for it. Knows no model."""
