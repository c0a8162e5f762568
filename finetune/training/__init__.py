"""One run from config to adapter: set-up, trainer, save policy, run record, and resume."""
