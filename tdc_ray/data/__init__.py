"""Images: where they come from, how they are decoded, batched, and named by content.

``load`` has the table of sources. Latents are images too: a first stage encodes them here.
May be used by diffusion and everything above it.
"""
