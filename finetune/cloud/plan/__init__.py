"""What a run would take and cost on each GPU, against ceilings."""
