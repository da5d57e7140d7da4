"""What a pipeline trains."""
