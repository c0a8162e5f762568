"""The launch policy that SkyPilot's client applies: which machines are candidates, and which bucket is mounted."""
