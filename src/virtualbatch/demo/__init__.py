"""`virtualbatch demo`: three trainings on real digits, compared.

`parent` starts the runs one after another, `digits` is the child that trains, `peak_memory`
measures it, and `result` holds the figures and the conclusion. Each run has a process of its own,
because a process never returns all of its memory.
"""
