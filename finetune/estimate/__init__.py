"""Estimates made before a run: memory, time, and what fits on a GPU. Arithmetic only, without torch."""
