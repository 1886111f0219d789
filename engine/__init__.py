"""The engine: the prefill's layer loop, decoding, sampling, and the LLM that ties them together."""
