"""The models: how they are loaded, what they are made of, and our own layers for them (fused/)."""
