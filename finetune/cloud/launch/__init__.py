"""What a launch may land on: the policy that SkyPilot's client applies, its candidates, its bucket."""
