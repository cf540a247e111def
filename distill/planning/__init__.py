"""What a run will take, before anything runs: counts, tokens x price, one measured rate."""
