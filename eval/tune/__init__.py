"""fastkv-eval tune: settings of FastKV for one model, and for the texts that its user reads with it."""
