"""What pairs are made of."""
