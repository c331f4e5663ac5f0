"""The machinery around a training step: preparation, metrics, averages of the weights."""
