"""Many adapters of one base: stacked, in a pool, and each with an optimizer of its own."""
