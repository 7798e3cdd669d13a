"""A run's directory and record, and what its recipe builds: rows, losses and models."""
