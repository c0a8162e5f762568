"""From sources to a prepared folder, and from its records to tokens."""
