"""The forward processes."""
