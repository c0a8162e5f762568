"""What a run was worth, on one page."""
