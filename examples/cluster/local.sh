#!/usr/bin/env bash
# A Dask cluster on this machine with a process for every role, the quickstart trained on it, and all of it stopped again.
#
#   examples/cluster/local.sh [--knob value ...]
#
# Set in the environment, if you like:
#   PYTHON   of the environment that has flowps; .venv/bin/python
#   SHARDS   PS workers with one shard each; 2
#   HUBS     hub tasks at once; 2
#   DATA     directory of the data set, generated if it is not there; data/quickstart
#   ROWS     training rows to generate; 8000000
#   RUN_DIR  what the run leaves; runs/cluster
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-.venv/bin/python} shards=${SHARDS:-2} hubs=${HUBS:-2} data=${DATA:-data/quickstart}
logs=$(mktemp -d)
scheduler=$logs/scheduler.json
started=()

end() { # PID...
    (($# == 0)) && return
    kill "$@" 2>/dev/null || true
    wait "$@" || true
}

stop() {
    status=$?
    end "${started[@]:1}" # workers first: they take their leave of the scheduler
    end "${started[@]:0:1}"
    if ((status == 0 || status == 130)); then
        rm -rf "$logs"
    else
        echo "what scheduler and workers have said is in $logs" >&2
    fi
    exit "$status"
}
trap stop EXIT

start() { # NAME COMMAND...: in a session of its own, so that Ctrl-C reaches the training command only
    setsid "$python" -m "${@:2}" >"$logs/$1.log" 2>&1 &
    started+=($!)
}

worker() { # NAME RESOURCES THREADS; --memory-limit 0: docs/cluster.md says why
    start "$1" dask worker --scheduler-file "$scheduler" --host 127.0.0.1 --name "$1" --resources "$2" \
        --nthreads "$3" --memory-limit 0 --no-nanny --no-dashboard --local-directory "$logs"
}

"$python" -m flowps.synthetic "$data" ${ROWS:+--rows "$ROWS" --test-rows "$((ROWS / 10 + 1))"}

start scheduler dask scheduler --host 127.0.0.1 --port 0 --dashboard-address 127.0.0.1:0 --scheduler-file "$scheduler"
worker hub "HUB=$hubs" "$hubs"
for ((k = 0; k < shards; k++)); do
    worker "ps-$k" PS=1 1
done
worker trainer TRAINER=1 1
until [[ -s $scheduler ]]; do # the run waits for the workers by itself
    kill -0 "${started[0]}"
    sleep 0.1
done

"$python" -m flowps.train examples/quickstart.toml \
    --data.train "$data/train-*.parquet" --data.test "$data/test-*.parquet" --run_dir "${RUN_DIR:-runs/cluster}" \
    --cluster.scheduler "$scheduler" --ps.num_shards "$shards" "$@"
