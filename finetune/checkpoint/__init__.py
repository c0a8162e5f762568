"""Checkpoints that survive the loss of the machine: the store, its manifest, its file operations, and the async writer."""
