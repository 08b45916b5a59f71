"""`virtualbatch bench`: compares accumulation with its alternatives, in one run.

A case is a model of one framework and a cut of a batch. Each case runs in its own process. There,
the first update of every contender is compared with the update of the uncut batch. Then all
contenders are timed in interleaved rounds.
"""
