"""`align study` and `align sweep`: one recipe under several settings and seeds, and what the differences are worth."""
