"""What run.json says of a run: kept up to date by the recorder, measured by measurements."""
