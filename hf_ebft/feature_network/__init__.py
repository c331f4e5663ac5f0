"""The frozen feature network phi: loading and placing it, and computing features with it."""
