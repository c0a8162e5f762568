"""What a run has cost and may cost: the ledger of its attempts, the meter, its ceilings and their last resort."""
