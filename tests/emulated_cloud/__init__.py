"""The real SkyPilot on an emulated Google Cloud, and the scenarios run on it."""
