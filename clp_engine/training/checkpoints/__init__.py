"""Checkpoints: what is in one, the best policy of a run, and how a run goes on from one."""
