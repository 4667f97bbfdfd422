"""Results in words and pictures: tables, charts, comparisons, and the figures of README.md and docs/."""
