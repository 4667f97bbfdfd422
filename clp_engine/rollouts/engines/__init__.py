"""The engines that draw the completions of a rollout, one per file."""
