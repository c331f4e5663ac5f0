"""The frozen feature network phi: building, placing and reading it."""
