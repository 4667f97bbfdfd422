"""`python -m bench tune`: what is tried on a device, the measuring of it, and the table that the kernels read."""
