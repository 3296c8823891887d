"""Models that run compiled, and whose LoRAs are switched without compiling again."""
