"""Models by reference: where they are, what they are, how they are loaded and talked to."""
