"""A run's YAML: its schema, how it is read, which values no run can have, and which keys a resume may change."""
