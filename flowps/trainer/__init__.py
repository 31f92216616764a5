"""The trainer: feeds → gradients.

`feed` reads batches, looks them up and delivers them in order; `step` is TensorFlow's part; `push` sends gradients back; `metrics`
scores; `loop` is the run of a trainer from first feed to last push, in its `surroundings`. At a `cut` it stands still, and gives a
`state` to go on from. Several trainers are a `group`, and `group_step` is their step; `stepping` is how a trainer comes by either.
Batches come as an iterable, lookup and push as callables: it knows nothing of hubs and shards. The only room that imports
TensorFlow.
"""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


# Written by C++ before its log level is read: what it is optimised for, which drivers it has not found.
_GREETING = re.compile(
    rb"WARNING: All log messages before absl|To enable the following instructions|"
    rb"([IWE]\d{4} |\d{4}-\d\d-\d\d )\d\d:\d\d:\d\d\.\d+.* (tensorflow|external|tsl|xla)/"
    rb"|[IWE]0000 00:00:\d+\.\d+ .*\.cc:\d+\]"
)


@contextlib.contextmanager
def _without_greeting() -> Iterator[None]:
    """Keep TensorFlow's greeting off the terminal.

    All else that any thread writes to standard error meanwhile is shown after, the greeting too if the import fails.
    """
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        failed = True
        try:
            yield
            failed = False
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            kept.seek(0)
            for line in kept:
                if failed or not _GREETING.match(line):
                    os.write(2, line)


with _without_greeting():
    import tensorflow  # noqa: F401
