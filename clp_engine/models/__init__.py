"""Base models whose parameters carry deltas, blended per row."""
