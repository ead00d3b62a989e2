"""What is written to disk and read back as data: outcomes, run files, checkpoints."""
