"""Evaluation: generates answers, runs their SQL, and compares the rows with those of the gold SQL."""
