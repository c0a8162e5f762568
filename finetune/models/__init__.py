"""The models: loading, shapes, and our own layers for them (fused/)."""
