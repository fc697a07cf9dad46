"""Configurations: their schemas, their checks, and the command line."""
