"""Pictures of numbers: as SVG for a page in light or dark, and as PNG. Needs matplotlib."""
