"""Google Cloud through SkyPilot: what machines cost, what a run would cost, and the launch."""
