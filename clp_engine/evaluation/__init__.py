"""Fronts: what a policy does at every weighting, beside the base model and other methods."""
