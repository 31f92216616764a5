"""Prefect 3: a flow that retrains every hour: `python workflows/deploy/prefect_flow.py pipeline.toml` serves it.

A retry goes on where the attempt before was killed; a run that finds nothing new does nothing.
"""

import subprocess
import sys

from prefect import flow, task
from prefect.tasks import exponential_backoff


@task(retries=3, retry_delay_seconds=exponential_backoff(backoff_factor=60), timeout_seconds=12 * 3600)
def retrain(pipeline: str) -> None:
    """All slots that are due. Raises CalledProcessError where it fails."""
    subprocess.run([sys.executable, "-m", "workflows.retrain", pipeline], check=True)


@flow(name="flowps-retrain")
def flowps_retrain(pipeline: str) -> None:
    """One retraining."""
    retrain(pipeline)


if __name__ == "__main__":
    flowps_retrain.serve("hourly", cron="15 * * * *", parameters={"pipeline": sys.argv[1]}, limit=1)
