"""Log-probabilities of targets straight from hidden states and the LM head, without logits."""
