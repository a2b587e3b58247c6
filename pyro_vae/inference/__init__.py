"""Uses of a fitted pair, and estimates that are better than those of its guide."""
