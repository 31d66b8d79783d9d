"""Classify large collections of images: parallel reading, batched prediction, resumable output."""
