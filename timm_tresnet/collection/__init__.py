"""Collections of images: read by several processes, classified, written as they go."""
