"""Plain torch, any device and dtype, float64 included: the specification that every other back-end is compared with."""
