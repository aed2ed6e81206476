"""Training of GenDR: degradations, data, pair making and the training runs. Not needed to use a model."""
