"""The real SkyPilot on an emulated Google Cloud, and the scenarios played on it."""
