"""Stage 2: score distillation of the one-step restorer (train.cida)."""
