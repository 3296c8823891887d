"""What users write: text in, plain data out. No torch, no files."""
