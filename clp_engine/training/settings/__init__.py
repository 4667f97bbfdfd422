"""CLPConfig, its checks, and the small frozen groups of settings that parts of the trainer take."""
