"""Running contenders in turn: processes, rounds, ratios, files of results; what compilers count."""
