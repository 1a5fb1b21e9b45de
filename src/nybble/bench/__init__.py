"""Racing nybble's engine against other runtimes on the same weights, in one run on one machine.

    workload   what every racer does: prompt, prefill texts, batches
    racers     which (runtime, format) pairs take part
    adapters/  one file a runtime: how it is fed and driven
    worker     the measuring process: one racer, once
    child      starting such a process, in this Python or in a peer's own
    race       rounds over all racers; standing: what came of one; report: table, Markdown, plot

`worker` and `adapters` also run in environments of peers, which hold neither nybble nor what it needs: at top level they
import the standard library and the few modules of nybble that need no more (child.SLIM).
"""
