"""Pure functions over parameter trees: init, join, merge, resolve, summary, rounding."""
