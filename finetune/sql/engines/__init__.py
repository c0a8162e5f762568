"""Who runs SQL that nobody trusts, one file an engine."""
