"""The commands of the command line, one module each: `options` describes it, `run` does it."""
