"""How single operations are computed on this machine, and which way is the fastest. Knows no model and no cache."""
