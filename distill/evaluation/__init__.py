"""Asking, scoring and comparing: what the student kept of its teacher, and how sure that is."""
