"""The product without a WebUI: diffusers pipelines, the embedded demo model, pictures."""
