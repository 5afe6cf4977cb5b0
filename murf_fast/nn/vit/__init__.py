"""Vision transformers at many resolutions: the encoder, the families it knows, and what is built on its maps."""
