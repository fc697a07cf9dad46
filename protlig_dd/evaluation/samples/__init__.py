"""Compare generated proteins with natural ones."""
