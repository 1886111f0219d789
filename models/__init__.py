"""The networks: reading a model folder, the layers, the weights and the tokenizer. Knows no cache and no policy."""
