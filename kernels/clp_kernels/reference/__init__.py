"""Plain torch, any device and dtype: the specification that every other back-end is compared with."""
