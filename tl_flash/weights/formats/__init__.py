"""One file a checkpoint format: which tensors there are, and each of them as numbers, a piece at a time."""
