"""One token per row of logits, with the log-probabilities a trainer needs."""
