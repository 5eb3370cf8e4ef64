"""Training of the testbed's weights from scratch: tokenizer, autoencoder, denoiser, dual encoder."""
