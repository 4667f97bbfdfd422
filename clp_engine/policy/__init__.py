"""What users hold: a conditioned policy, and what is made of one."""
