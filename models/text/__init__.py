"""Text of a model folder: tokenizer, streamed text and chat templates. Knows nothing of the network."""
