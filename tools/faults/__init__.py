"""Full disks and I/O errors in every command (tools/fault_loop), each held against a model of the
store.

`bad_disk` is a file system on a disk that fails when told to (tests/fault/test_bad_disk.py).
`injection` makes the n-th system call of a command fail; `scenarios` has the commands, each with
the store that it is run on and what must be there afterwards; `sweep` runs them, once for every
call and kind of fault. The corpus, the model and the tracing are those of `tools.crashes`.
"""
