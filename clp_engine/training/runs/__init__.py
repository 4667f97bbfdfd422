"""Runs: what one is about, its folder, whose it is, and having one trained."""
