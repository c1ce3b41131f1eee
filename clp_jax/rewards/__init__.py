"""Rewards: what scores a response, and the normalisation of scores."""
