"""Images: where they come from, how they are decoded, batched, and named by content.

Latents are images too: a first stage turns one into the other here.
May be used by diffusion and everything above it.
"""
