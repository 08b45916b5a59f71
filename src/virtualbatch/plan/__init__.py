"""It fits: the size that memory holds and that is fast, and a smaller one where memory ran out."""
