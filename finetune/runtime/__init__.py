"""What every other part builds on: files, the console, distributed processes, signals. Nothing here knows about a run."""
