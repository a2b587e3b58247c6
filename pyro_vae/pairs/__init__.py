"""The contract of a pair, and how it is run."""
