"""Training objectives: one file each, and their registry."""
