"""Checks whether this machine, the account, its quotas and the bucket are ready."""
