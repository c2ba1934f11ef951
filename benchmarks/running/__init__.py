"""Running contenders in turn: processes, rounds, ratios of medians, and files of results."""
