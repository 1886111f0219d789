"""The networks: reading a model folder, the layers and the weights. Knows no cache and no policy."""
