#!/bin/bash
# Slurm: one Ray cluster per job, one Ray node per machine; the head is on the first machine, and the run in this script.
#   sbatch cluster/slurm.sh configs/sd15.yaml run.dir=/shared/runs training.num_workers=16 \
#     training.batch_size_per_worker=2 resources.generators.num_actors=16
# The same command resumes the run after a time limit or a lost machine. See README.md.
#SBATCH --job-name=cdpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
# The last line: five minutes before the limit, training finishes its update and writes a checkpoint.
set -euo pipefail
umask 077

# The token is a file of the shared home that only you can read: machines of a Slurm cluster have other users.
RAY_AUTH_TOKEN_PATH=$(mktemp "$HOME/.cdpo-token-$SLURM_JOB_ID-XXXXXX")
export RAY_AUTH_TOKEN_PATH RAY_AUTH_MODE=token RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=1
head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' > "$RAY_AUTH_TOKEN_PATH"
# NCCL must not choose an interface that other machines do not reach. Set NCCL_IB_HCA if only some adapters are cabled.
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-^docker,lo,virbr} NCCL_DEBUG=${NCCL_DEBUG:-WARN}

steps=()
run=
finish() {  # ends only what this script started; Slurm ends the Ray nodes with their steps
  trap - EXIT TERM INT
  if [[ -n $run ]]; then
    kill -TERM "$run" 2> /dev/null || true
    wait "$run" || true
  fi
  for step in "${steps[@]}"; do kill -TERM "$step" 2> /dev/null || true; done
  wait || true
  rm -f "$RAY_AUTH_TOKEN_PATH"
}
trap finish EXIT
trap 'finish; exit 143' TERM INT

mapfile -t machines < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_machine=${machines[0]}
port=$((20000 + SLURM_JOB_ID % 10000))  # jobs that share a machine get ports of their own
options=(--block --disable-usage-stats --dashboard-agent-listen-port=$((port + 30000)))
options+=(--num-cpus="${CDPO_CPUS_PER_NODE:-${SLURM_CPUS_ON_NODE:-1}}")
[[ -z ${SLURM_GPUS_ON_NODE:-} ]] || options+=(--num-gpus="$SLURM_GPUS_ON_NODE")

srun --nodes=1 --ntasks=1 --overlap --nodelist="$head_machine" \
  ray start --head --port="$port" --dashboard-host=127.0.0.1 --dashboard-port=$((port + 10000)) \
  --ray-client-server-port=$((port + 20000)) "${options[@]}" &
steps+=($!)
export RAY_ADDRESS=$head_machine:$port
for attempt in {1..60}; do  # a head on a busy file system takes a minute
  if (exec 3<> "/dev/tcp/$head_machine/$port") 2> /dev/null; then break; fi
  kill -0 "${steps[0]}" 2> /dev/null || { echo "slurm.sh: the head of Ray ended; see its lines above" >&2; exit 1; }
  if [[ $attempt = 60 ]]; then echo "slurm.sh: $RAY_ADDRESS does not answer within 2 minutes" >&2; exit 1; fi
  sleep 2
done
if ((${#machines[@]} > 1)); then
  others=$(IFS=,; echo "${machines[*]:1}")
  srun --nodes=$((${#machines[@]} - 1)) --ntasks-per-node=1 --overlap --nodelist="$others" \
    ray start --address="$RAY_ADDRESS" "${options[@]}" &
  steps+=($!)
fi

# The run starts once all machines have joined: it checks its resources against those that are there.
python - "${#machines[@]}" << 'END'
import sys, time
import ray

ray.init(address="auto", logging_level="ERROR")
for _ in range(120):
    if (joined := sum(node["Alive"] for node in ray.nodes())) == int(sys.argv[1]):
        sys.exit()
    time.sleep(1)
sys.exit(f"slurm.sh: {joined} of {sys.argv[1]} machines joined Ray within 2 minutes")
END
cdpo run "$@" &
run=$!
status=0
wait "$run" || status=$?
run=
exit "$status"
