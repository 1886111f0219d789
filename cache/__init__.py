"""The KV cache, and the policies that decide what goes into it. Knows no model."""
