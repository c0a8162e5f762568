"""Answer generators, which turn prompts into answers; one file each."""
