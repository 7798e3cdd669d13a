"""Rollouts: prompts -> completions of the policy, by transformers or vLLM; and the loop that trains on them."""
