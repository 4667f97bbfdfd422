"""A base model whose parameters carry deltas, blended per row."""
