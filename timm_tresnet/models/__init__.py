"""The network, its blocks, heads and arguments; layers/ has one file for each ingredient."""
