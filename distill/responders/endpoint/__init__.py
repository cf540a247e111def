"""A server answers, and is paid once."""
