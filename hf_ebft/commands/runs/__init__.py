"""The parts of a run that several commands share: options, loading, both modes, saving."""
