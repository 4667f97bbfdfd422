"""Prompts to train and evaluate on, and reward functions."""
