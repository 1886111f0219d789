"""fastkv-batch: many prompts on many workers, through Ray. command.py is the command."""
