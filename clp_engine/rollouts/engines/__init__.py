"""What a rollout draws from, one engine a file."""
