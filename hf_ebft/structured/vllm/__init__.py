"""Rollouts from a stock vLLM server: requests, sending weights, and checks of what it samples."""
