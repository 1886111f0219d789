"""Speculation: tokens are guessed cheaply, several at a time, and the model says of all of them at once which stay."""
