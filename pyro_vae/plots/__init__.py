"""Draw figures of data and of pairs."""
