"""Exports: a run's model in the forms that other programs load, scored again before they are handed over."""
