"""Offline jobs on LoRA and model files. They read no global options: everything arrives as an argument."""
