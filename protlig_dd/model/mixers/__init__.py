"""What lets the tokens of a sequence see one another."""
