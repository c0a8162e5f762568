"""Turns data sources into a prepared folder, and its records into tokens."""
