"""What a run has cost and may cost: the ledger of its attempts, the meter, and the watchdog that enforces the ceilings."""
