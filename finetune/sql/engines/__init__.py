"""SQL engines, which run untrusted SQL; one file each."""
