"""`virtualbatch demo`: three trainings on real digits, compared.

`parent` starts the runs one after another. `digits` is the child process that trains. `peak_memory`
measures its memory. `result` holds the figures and the conclusion. Each run has its own process,
because a process never returns all of its memory.
"""
