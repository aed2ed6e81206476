"""Stage 1: a text-to-image base in another latent space, with representation alignment (train.repa)."""
