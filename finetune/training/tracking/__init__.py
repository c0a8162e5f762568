"""Where the curves go: TensorBoard, Weights & Biases, MLflow, Trackio; one curve each over all attempts of a run."""
