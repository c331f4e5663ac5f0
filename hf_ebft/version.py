"""The package's version, in the one place that packaging, code and tests read it from."""

__version__ = "0.1.0"
