"""A small stand-in for the WebUI's package: the parts that an extension meets, with the real signatures and order."""
