"""Tests with real processes: DDP and FSDP2 over gloo on the CPU."""
