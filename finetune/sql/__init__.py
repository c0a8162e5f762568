"""Running SQL nobody trusts, telling whether two results are equal, knowing what a database looks like."""
