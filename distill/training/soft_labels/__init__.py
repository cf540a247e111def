"""The teacher's distributions: captured, stored, and learnt from."""
