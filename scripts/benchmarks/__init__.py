"""How fast what is, and what it costs."""
