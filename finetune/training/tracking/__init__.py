"""Where the curves go: TensorBoard and Weights & Biases, one curve each over all attempts of a run."""
