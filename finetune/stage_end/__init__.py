"""What a stage says when it ends: what it cost, and what to type next."""
