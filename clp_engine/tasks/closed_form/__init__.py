"""Tabular tasks with an optimum in closed form, and policies to train on them."""
