"""Planning on TensorFlow."""
