"""Makes a model forget: data and splits, losses, methods, the one training loop."""
