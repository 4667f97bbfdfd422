"""Helpers for the whole package: errors, files, seeds, conditions, ranges of settings, statistics, origin of a result."""
