#!/usr/bin/env bash
# Trains on the nodes of a Slurm job, from a directory that all of them see:
#   sbatch --nodes=3 --gpus-per-node=2 cluster/slurm.sh cluster/config.yaml \
#     --run_dir=/shared/runs/name \
#     '--ray.labels={learner: {role: learner}, generator: {role: generator}}'
# The first LEARNER_NODES nodes (1) get the label role=learner, the others role=generator; with one
# node there are no labels ('--ray.labels={}'). None has role=scorer: scorers run anywhere. Five minutes before the time limit the run is stopped in order, with
# the running update committed, and the job is queued again, which resumes it.
#SBATCH --job-name=raygrpo
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
# --exclusive is needed: at its end, ray symmetric-run stops every Ray on its nodes.
set -euo pipefail

if [ $# -eq 0 ]; then
    echo "usage: sbatch [--nodes=N] cluster/slurm.sh CONFIG [--section.key=value ...]" >&2
    exit 2
fi

nodes="$SLURM_JOB_NUM_NODES"
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# The address by which the other nodes reach the first one: its name may mean loopback to itself.
read -r host _ < <(srun --nodes=1 --ntasks=1 --nodelist="${hosts[0]}" hostname -I)
export RAYGRPO_ADDRESS="$host:$((20000 + SLURM_JOB_ID % 20000))"
export RAYGRPO_PID_FILE="${TMPDIR:-/tmp}/raygrpo-$SLURM_JOB_ID.pid"
export LEARNER_NODES="${LEARNER_NODES:-1}"
# A token of this job's own, which srun hands on in the environment.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN="$(od -An -tx1 -N32 /dev/urandom | tr -d ' \n')"
export RAY_AUTH_TOKEN
export RAY_USAGE_STATS_ENABLED=0
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT="${RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT:-300}"

# Runs on each node; the command after "--" on the first one only. RAY_ADDRESS is for that command
# alone: without it, it would start a Ray of its own.
# shellcheck disable=SC2016  # to be expanded on the node
on_each_node='
    labels=()
    if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
        role=generator
        [ "$SLURM_NODEID" -ge "$LEARNER_NODES" ] || role=learner
        labels=("--labels=role=$role")
    fi
    exec ray symmetric-run --address "$RAYGRPO_ADDRESS" --min-nodes "$SLURM_JOB_NUM_NODES" \
        --num-cpus="${SLURM_CPUS_ON_NODE:-1}" "${labels[@]}" -- \
        env RAY_ADDRESS="$RAYGRPO_ADDRESS" bash -c \
        "echo \$\$ > \"\$RAYGRPO_PID_FILE\"; exec python -m raygrpo train \"\$@\"" raygrpo "$@"
'

# This script runs on the first node, as the driver does: the signal is for the driver alone, since
# the update that is to be finished needs Ray on all nodes.
# shellcheck disable=SC2329  # it is: by the trap
stop() {
    echo "stopping in order"
    [ ! -f "$RAYGRPO_PID_FILE" ] || kill -TERM "$(cat "$RAYGRPO_PID_FILE")" || true
}
trap stop TERM INT

srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=0 \
    bash -c "$on_each_node" raygrpo "$@" &
step=$!
code=0
wait "$step" || code=$?
# A signal ends a wait, not the step.
while kill -0 "$step" 2>/dev/null; do
    code=0
    wait "$step" || code=$?
done
rm -f "$RAYGRPO_PID_FILE"
if [ "$code" -eq 3 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
