"""Where caches are kept on disk; set by the tests."""

cache_dir = ""
