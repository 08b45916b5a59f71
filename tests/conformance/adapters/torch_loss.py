"""Adapter of the PyTorch engine whose windows stand behind one node: `loss(...).backward()`."""

from tests.conformance.adapters import torch as plain

import virtualbatch.torch as vb


class Adapter(plain.Adapter):
    name = "torch_loss"

    def differentiated(self, loss, batch, guard, **options):
        with guard:
            found = vb.loss(loss, batch, **options)
        # Outside the guard: a node reads what arrives there where that is on the host.
        (found[0] if isinstance(found, tuple) else found).backward()
        return found

    def of_all_rows(self, loss, batch, module):
        rows = len(next(iter(batch.values())))
        return vb.loss(loss, batch, module=module, microbatch_size=rows)
