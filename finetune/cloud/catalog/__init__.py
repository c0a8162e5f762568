"""What a machine costs in a zone, and whether the price is an anomaly."""
