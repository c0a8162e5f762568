"""Memory, time and cost of a run on each GPU, checked against ceilings."""
