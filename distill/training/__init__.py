"""The student: encoding, losses, checkpoints and the loop."""
