"""Drawing completions, and scoring them under policy and reference."""
