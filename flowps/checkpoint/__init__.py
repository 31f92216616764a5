"""A run's state on disk: what a cut through it has, the files it is in, and which of them can be trusted.

Knows nothing of rows or models: shards and trainers give arrays and take them back.
"""
