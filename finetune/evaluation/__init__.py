"""What a model has learned: it is asked, its SQL is run, its rows are compared and counted."""
