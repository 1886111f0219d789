"""fastkv-eval: what a policy costs in accuracy, measured on long texts. The engine knows nothing of it."""
