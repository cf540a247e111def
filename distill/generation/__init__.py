"""The teacher's answers, and the filters that choose what is trained on."""
