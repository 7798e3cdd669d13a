"""A run from its recipe to its summary, offline and online."""
