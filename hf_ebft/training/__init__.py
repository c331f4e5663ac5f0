"""The machinery of a training step: preparation, metrics, averages of the weights."""
