"""What a prompt leaves behind: the KV cache, and the policies that decide what goes into it. Knows no model."""
