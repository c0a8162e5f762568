"""Runs untrusted SQL, compares results, and reads the schemas of databases."""
