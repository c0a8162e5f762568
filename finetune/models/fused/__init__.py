"""A decoder layer with LoRA whose forward and backward are written by hand, over small operations in torch or Triton."""
