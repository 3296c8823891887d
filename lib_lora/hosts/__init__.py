"""The programs that the core runs in; no host imports another."""
