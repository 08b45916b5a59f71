"""Planning on PyTorch."""
