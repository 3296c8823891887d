"""Training: from a folder of pictures to a LoRA file, or to a tuned model."""
