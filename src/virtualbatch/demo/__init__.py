"""`virtualbatch demo`: three trainings on real digits, and what they show.

`parent` spawns the runs one after another, `digits` is the child that trains, `peak_memory`
measures it, and `result` holds the figures and the sentence drawn from them. Each run has a
process of its own, because a process never gives all of its memory back.
"""
