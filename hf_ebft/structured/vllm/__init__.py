"""Rollouts from a vLLM server: client, weight sync, handshake, prefetching."""
