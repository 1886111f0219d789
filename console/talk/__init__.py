"""fastkv-chat: a conversation in a terminal, or from a pipe. command.py is the command."""
