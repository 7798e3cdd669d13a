"""What a list costs, of a policy and of a reward model, and what is measured of it."""
