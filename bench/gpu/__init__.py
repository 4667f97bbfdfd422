"""Rounds of measurements on a GPU machine, and those of their stages that are no benchmark case."""
