"""Weights: catalogue, configs, labels, checkpoint names, loading; and the weights embedded in the package."""
