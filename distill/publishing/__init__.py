"""The release: merged weights, model card, upload."""
