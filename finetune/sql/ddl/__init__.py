"""Reads DDL: `reader` all dialects with sqlglot, `in_sqlite` SQLite's with SQLite itself."""
