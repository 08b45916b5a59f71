"""`virtualbatch bench`: accumulation beside what one would use instead, in one run.

A case is a model of one framework and a cut of a batch. Each case runs in a process of its own, in
which all contenders are timed in interleaved rounds; each must first make the update of the uncut
batch.
"""
