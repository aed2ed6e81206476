"""Training data: pictures, streams of crops, shards, degradations."""
