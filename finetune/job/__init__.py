"""What a job does on a rented machine, around the commands that it calls."""
