"""What training optimises: one file an objective, and their registry."""
