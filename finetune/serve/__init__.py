"""Serving: an OpenAI-compatible endpoint that answers questions about databases with SQL."""
