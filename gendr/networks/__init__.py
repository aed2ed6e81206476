"""The networks of one step and how they run: UNet, autoencoder, folded form, strips."""
