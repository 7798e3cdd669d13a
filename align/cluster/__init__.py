"""Bulk work on a Ray cluster: rows stream in windows through actors; the files stay those of the command."""
