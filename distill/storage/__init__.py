"""What survives a crash: files, the log of answers, the run's folder."""
