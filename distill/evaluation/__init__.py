"""Evidence: scorers, statistics, economics and the report."""
