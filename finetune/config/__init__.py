"""A run's YAML: its schema, how it is read and validated, and which keys may change on resume."""
