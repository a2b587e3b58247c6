"""Data sets by name or from files, and their minibatches."""
