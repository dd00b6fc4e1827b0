"""The autoencoder: K tokens to one latent vector and back."""
