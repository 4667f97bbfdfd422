"""Words that every room uses: errors, files, seeds, conditions, ranges of settings, statistics, where a result came from."""
