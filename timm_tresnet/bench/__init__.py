"""Benchmarks that measure networks side by side."""
