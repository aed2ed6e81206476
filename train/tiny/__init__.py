"""What only GenDR-Tiny's training in pixels needs: a discriminator and a frozen teacher."""
