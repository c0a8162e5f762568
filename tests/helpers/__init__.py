"""What tests of several packages share, and programs that they start."""
