"""Who turns prompts into answers, one file a generator."""
