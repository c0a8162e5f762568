"""What launches keep in the user's bucket for the next ones."""
