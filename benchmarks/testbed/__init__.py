"""Scenes -> the weights of the testbed: tokenizer, autoencoder, denoiser, dual encoder, trained from scratch."""
