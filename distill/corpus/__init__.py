"""Documents and prompts: everything before a model is asked."""
