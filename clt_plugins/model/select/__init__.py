"""The selection in PyTorch's own operations, for kernels that have none of their own."""
