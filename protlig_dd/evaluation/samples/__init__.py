"""Generated proteins beside natural ones."""
