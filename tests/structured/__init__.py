"""Structured mode's tests, which are skipped where TRL or `datasets` is missing."""

import pytest

# Here, and so before any module of the folder is imported.
pytest.importorskip("datasets")
pytest.importorskip("trl")
