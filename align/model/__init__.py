"""The policy and its reference: loading, adapters, forward pass, cached reference log-probabilities."""
