"""What SkyPilot runs on a cloud machine."""
