"""How a transformers model runs a packed row: masks, attention, sampling, log-probabilities."""
