"""Benchmarks: each is one command, and each checks equality before it times."""
