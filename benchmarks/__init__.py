"""Measurements of GenDR: time, memory, operations and parity. Not needed to use a model."""
