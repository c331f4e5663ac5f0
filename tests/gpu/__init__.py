"""What only an accelerator can confirm. Run with `pytest -m gpu tests/gpu`."""
