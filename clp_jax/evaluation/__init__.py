"""Fronts, sweeps over weightings, and the reports drawn from them."""
