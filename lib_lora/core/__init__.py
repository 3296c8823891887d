"""LoRA on weights: files, layer names, adapters, plans, and the one writer. Knows torch and safetensors only."""
