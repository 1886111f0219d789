"""fastkv-plan: what a request would take on machines that are not here. command.py is the command."""
