"""Finds a size that fits in memory and is fast, and a smaller one after memory ran out."""
