"""Selection on a CUDA GPU: `batch_select` and `token_select`; the others are what they launch."""
