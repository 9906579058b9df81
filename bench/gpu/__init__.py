"""``make gpu``: everything a machine with a GPU is for, in one command and eight minutes.

    __main__.py  the order of things, and their deadlines
    worker.py    the process that measures, which a fault of the GPU may take down
    workers.py   its parent: starts another where that happens, and keeps what there is
    suite.py     the tests, many processes at a time, for most of their time goes into compiling
    selection.py a pytest plugin: which tests a GPU is for, and which of them a process runs
    model.py     a prediction, of what none has measured yet
    consistency_model.py  the consistency's part of it
    machine.py   the GPU that it predicts for, and how it shares out work
    host.py      what a call costs on the host, without a GPU
    stored.py    the runs that were kept

What is measured, how, and the tables of it are those of ``python -m bench``. Needs torch and pytest
alone: no git, no network, nothing installed.
"""

FUSED = ("triton", "cuda")  # the implementations with kernels for GPUs
