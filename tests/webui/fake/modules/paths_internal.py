"""Where the user's data is; set by the tests."""

data_path = ""
extensions_dir = ""
