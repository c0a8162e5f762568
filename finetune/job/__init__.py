"""The work of a job on a cloud machine, around the commands that it starts."""
