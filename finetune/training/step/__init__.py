"""One optimizer step: its plan for this GPU, its examples, its micro-batches, and the optimizer's flat tensor."""
