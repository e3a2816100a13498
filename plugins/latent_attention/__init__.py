"""Absorbed latent attention over the latent cache, written in place, as one operator."""
