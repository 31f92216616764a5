"""Airflow 3: a DAG that retrains every hour. Copy it to the DAGs folder, and set the variable `flowps_pipeline`.

A retry goes on where the attempt before was killed; runs do not overlap, and a run that finds nothing new does nothing.
"""

from datetime import timedelta

import pendulum
from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG

with DAG(
    "flowps_retrain",
    schedule="15 * * * *",
    start_date=pendulum.datetime(2024, 1, 1, tz="UTC"),
    catchup=False,  # one run takes all slots that are due
    max_active_runs=1,
    default_args={
        "retries": 3,
        "retry_delay": timedelta(minutes=1),
        "retry_exponential_backoff": True,
        "execution_timeout": timedelta(hours=12),
    },
):
    BashOperator(task_id="retrain", bash_command="exec python -m workflows.retrain {{ var.value.flowps_pipeline }}")
