"""What a request costs, and what the student saves."""
