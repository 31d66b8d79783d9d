"""What is known of weights: catalogue, configs, labels, names in checkpoints; and the weights in the package."""
