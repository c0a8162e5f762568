"""Checkpoints that survive a machine that vanishes: the store, its manifest, its files, and the writer behind training."""
