"""Collecting a step's batch: prompts and conditions, completions, rewards, the reference's hidden states."""
