"""What a machine costs in a zone, and whether to believe it."""
