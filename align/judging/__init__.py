"""Which of two policies writes better, by how much, and how far that can be trusted."""
