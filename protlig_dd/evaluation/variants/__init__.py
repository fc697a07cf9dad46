"""The effects of mutations."""
