"""Scorecard and report, for people."""
