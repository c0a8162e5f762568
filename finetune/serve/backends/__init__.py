"""Who computes the answers of the endpoint: one file each, and what they share."""
