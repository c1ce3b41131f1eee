"""Losses and advantages of the policy-gradient algorithms, all pure."""
