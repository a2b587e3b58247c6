"""Sources of data and minibatches, and data sets by name."""
