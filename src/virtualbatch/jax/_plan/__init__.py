"""Planning on JAX."""
