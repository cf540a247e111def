"""A place to run generated programs where they can do no harm, and only where that is allowed."""
