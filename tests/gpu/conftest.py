"""Tests of a GPU: `make test-gpu` on a machine that has one. Elsewhere they skip, and say so.

They are no part of `make test`. What they found, and when, is in docs/guides/cuda_graphs.md.
"""
