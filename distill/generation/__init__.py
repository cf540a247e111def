"""Answers: responders, the store of what they said, and the filters."""
