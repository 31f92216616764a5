#!/usr/bin/env bash
# flowps on the nodes of one SLURM job: scheduler, hub and the run on the first, a trainer on the last, a shard on each one between.
#
#   TLS=$HOME/flowps-tls sbatch examples/cluster/slurm.sh run.toml [--knob value ...]
#
# Paths are on a file system that all nodes share; the environment of whoever submits has flowps.
#   TLS        directory with ca.pem, cert.pem, key.pem and token, as docs/cluster.md makes them
#   RUN_DIR    what the run leaves; runs/JOB
#   INTERFACE  of the fast network; empty: the one that a node's name leads to
#SBATCH --job-name=flowps
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --exclusive
#SBATCH --time=04:00:00
set -euo pipefail
tls=${TLS:?a directory with ca.pem, cert.pem, key.pem and token}
run_dir=${RUN_DIR:-$PWD/runs/$SLURM_JOB_ID}
scheduler=$run_dir.scheduler.json
threads=${SLURM_CPUS_PER_TASK:-1}
network=(${INTERFACE:+--interface "$INTERFACE"})
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
shards=$((${#nodes[@]} - 2))
((shards > 0)) || { echo "needs 3 nodes or more, has ${#nodes[@]}" >&2 && exit 2; }
mkdir -p "$(dirname "$run_dir")"

on() { # NODE COMMAND...: beside what runs there already
    srun --nodes=1 --ntasks=1 --overlap --nodelist="$1" "${@:2}" &
}

worker() { # NODE NAME RESOURCES THREADS
    on "$1" python -m dask worker --scheduler-file "$scheduler" "${network[@]}" --name "$2" --resources "$3" --nthreads "$4" \
        --memory-limit 0 --no-nanny --no-dashboard --local-directory "${TMPDIR:-/tmp}"
}

trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -f "$scheduler"' EXIT
on "${nodes[0]}" python -m dask scheduler --port 0 --scheduler-file "$scheduler" "${network[@]}"
worker "${nodes[0]}" hub "HUB=$threads" "$threads"
for ((k = 0; k < shards; k++)); do
    worker "${nodes[k + 1]}" "ps-$k" PS=1 1
done
worker "${nodes[-1]}" trainer "TRAINER=1${SLURM_GPUS_ON_NODE:+,GPU=$SLURM_GPUS_ON_NODE}" 1
until [[ -s $scheduler ]]; do
    sleep 1
done

python -m flowps.train "$@" --run_dir "$run_dir" --cluster.scheduler "$scheduler" --cluster.wait_s 600 \
    --cluster.interface "${INTERFACE:-}" --ps.num_shards "$shards" \
    --cluster.tls_ca "$tls/ca.pem" --cluster.tls_cert "$tls/cert.pem" --cluster.tls_key "$tls/key.pem" --cluster.tls_name flowps \
    --cluster.token_file "$tls/token"
