"""Effects of mutations."""
