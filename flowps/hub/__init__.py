"""The hub: partitions of sample files → batches.

`schema` decides what each column is; `partition` lists files and reads row groups; `hashing` turns values into signs; `decode`
turns Arrow columns into batches; `stream` runs all of it as Dask tasks, in order and bounded. Knows nothing of who reads.
"""
