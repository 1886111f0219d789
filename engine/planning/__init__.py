"""What a request will take on a machine that is not here: memory (planned.py); times by a cost model (expected.py)."""
