"""The data side of training: from folders of pictures and captions to batches that depend on seed and step alone."""
