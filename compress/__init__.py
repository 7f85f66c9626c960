"""Makes a model smaller: formats, methods, one walk over the layers, checkpoints."""
