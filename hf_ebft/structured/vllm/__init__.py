"""Rollouts from a stock vLLM server: asking it, sending it weights, checking what it samples."""
