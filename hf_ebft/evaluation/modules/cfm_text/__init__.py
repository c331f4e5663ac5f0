"""A module of `evaluate`; see `hf_ebft.evaluation.modules`."""
