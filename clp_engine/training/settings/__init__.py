"""CLPConfig, how it is checked, and the small frozen groups that are handed on."""
