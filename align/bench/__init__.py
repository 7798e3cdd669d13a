"""Benchmarks against peers; each module has `run() -> dict` and is one NAME of `python -m align.bench NAME`."""
