"""What commands that load a model and data share: options, loading, the two modes, the end."""
