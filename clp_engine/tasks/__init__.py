"""Embedded problems: data, rewards and a model to start from, or an optimum that is known."""
