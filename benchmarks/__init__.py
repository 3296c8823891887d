"""One script for each claim of the README; `results/` holds what they measured, with machine, versions and date."""
