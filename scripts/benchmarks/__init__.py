"""Benchmarks of speed, memory and cost."""
