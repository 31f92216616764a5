"""The trainer: feeds → gradients.

`feed` reads batches, looks them up and delivers them in order; `step` is TensorFlow's part; `push` sends gradients back; `metrics`
scores; `loop` is the run of a trainer from first feed to last push. Batches come as an iterable, lookup and push as callables:
it knows nothing of hubs and shards. The only room that imports TensorFlow.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@contextlib.contextmanager
def _without_greeting() -> Iterator[None]:
    """Keep TensorFlow's greeting (drivers, instruction sets; written by C++ before its log level is read) off the terminal.

    What is written to standard error meanwhile is shown after all if the import fails.
    """
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except BaseException:
            kept.seek(0)
            os.write(terminal, kept.read())
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


with _without_greeting():
    import tensorflow  # noqa: F401
