"""Recompute saved tensors in backward instead of storing them."""
