"""Sweeps: many runs of one config under one budget, of which the worse ones are stopped early."""
