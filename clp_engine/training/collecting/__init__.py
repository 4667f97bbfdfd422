"""What a step learns from: completions, their rewards, and the reference's states."""
