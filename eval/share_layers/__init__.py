"""fastkv-eval share-layers: which layers can read an earlier one's entries? The map that --share-layers reads."""
