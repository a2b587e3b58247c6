"""The contract of a pair, and the tools that run a pair."""
