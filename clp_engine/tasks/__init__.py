"""Embedded problems: a start model with data and rewards, or a tabular task with a known optimum."""
