"""What a fitted pair is used for, and better estimates than the guide's own."""
