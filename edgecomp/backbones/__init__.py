"""Host encoders, and the model in which a compressor stands: alone, as the encoder, or after one."""
