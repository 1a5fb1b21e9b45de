"""What the methods are made of: one loop that rounds with feedback, one that refines, one builder of targets, one of scales.

A method is a setting of these (see `settings`); none has arithmetic of its own. All of it is float64, in torch, single-
threaded inside a slab of rows: the slabs are fixed, so that one thread or two give the same codes.
"""
