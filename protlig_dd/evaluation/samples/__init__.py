"""Compare generated proteins with natural proteins, and score redesigned proteins."""
