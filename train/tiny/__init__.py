"""What only GenDR-Tiny's training in pixels needs: fresh pairs, a perceptual term, a discriminator."""
