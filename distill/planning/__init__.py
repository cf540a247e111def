"""What a run will take, before anything runs: counts from the corpus, tokens times price, seconds from one measurement."""
