"""What a run needs before it begins: memory, seconds, what fits on a GPU. Arithmetic alone, no torch."""
