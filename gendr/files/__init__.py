"""Model files: read, check, describe, write."""
