"""What every part stands on: files, the console, several processes, signals. Nothing here knows of a run."""
