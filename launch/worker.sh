#!/usr/bin/env bash
# The part of tpu.sh that runs on a worker of the slice, called over ssh:
#
#   worker.sh setup COMMIT            install source/ into .venv
#   worker.sh start LOGS CACHE ARGUMENT...
#                                     `clp ARGUMENT...` as a job of its own
#   worker.sh status                  one line: worker N STATE [what it said last]
#   worker.sh logs LINES [follow]     the job's output, each line with its worker
#   worker.sh stop SECONDS            SIGTERM; after so many seconds, SIGKILL
#
# STATE is "running", "exited STATUS", "lost" (ended without a status: the
# machine was restarted) or "idle". There is one job at a time. Everything lies
# in ~/clp_jax:
#
#   source/     the archive, unpacked by tpu.sh; the job's current folder
#   .venv/      the environment; `installed` names the commit it was made for
#   lock        held while a job runs
#   job/        command, pid, status and log of the last job
set -euo pipefail

root=$HOME/clp_jax

# The worker's index. GKE says it in the environment, a TPU VM in its metadata.
worker_number() {
  if [[ -n ${TPU_WORKER_ID:-} ]]; then
    echo "$TPU_WORKER_ID"
  else
    curl -sf -H 'Metadata-Flavor: Google' \
      http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number
  fi
}

setup() {
  local commit=$1
  cd "$root"
  rm -f installed
  # TPU VM images bring a Python that is too old, so uv fetches one.
  export PATH=$PATH:$HOME/.local/bin
  if ! command -v uv >/dev/null; then
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
  fi
  uv venv --quiet --allow-existing --python 3.12 .venv
  uv pip install --quiet --python .venv/bin/python --editable './source[tpu]'
  .venv/bin/clp --help >/dev/null
  echo "$commit" >installed
}

# The probe's lock is shared, so that two probes don't see each other.
is_running() {
  ! flock --shared --nonblock "$root/lock" true
}

start() {
  local command
  command=$(printf '%q ' "${@:2}") # LOGS differs from start to start
  if is_running; then
    if [[ $(cat "$root/job/command") == "$command" ]]; then
      return 0
    fi
    echo "worker $(worker_number): another job is running here:" \
      "$(cat "$root/job/command")" >&2
    exit 1
  fi
  rm -rf "$root/job"
  mkdir "$root/job"
  echo "$command" >"$root/job/command"
  # Its own session, so that it outlives this connection.
  setsid nohup bash "${BASH_SOURCE[0]}" supervise "$@" \
    </dev/null >"$root/job/log" 2>&1 &
  local tries
  for ((tries = 0; tries < 300; tries++)); do
    if [[ -e $root/job/pid ]]; then
      return 0
    fi
    sleep 0.1
  done
  echo "worker $(worker_number): the job did not start:" \
    "$(tail -n 1 "$root/job/log")" >&2
  exit 1
}

# The job itself: runs clp, writes its status down and keeps copies of the log.
supervise() {
  local logs=$1 cache=$2
  shift 2
  exec 9>"$root/lock"
  flock --timeout 10 9
  echo "$$" >"$root/job/pid"
  # `stop` and a preemption signal every process: clp saves and ends, and this
  # script stays to write the status.
  trap : TERM
  cd "$root/source"
  export JAX_COMPILATION_CACHE_DIR=$cache PYTHONUNBUFFERED=1
  while sleep 60; do copy_log "$logs"; done 9>&- &
  local copier=$! status=0
  "$root/.venv/bin/clp" "$@" || status=$?
  kill "$copier" 2>/dev/null || true
  echo "$status" >"$root/job/status.partial"
  mv "$root/job/status.partial" "$root/job/status"
  copy_log "$logs"
}

copy_log() {
  local target
  target=$1/worker-$(worker_number).log
  case $target in
    gs://*) gcloud storage cp --quiet "$root/job/log" "$target" ;;
    *) mkdir -p "$1" && cp "$root/job/log" "$target" ;;
  esac >/dev/null 2>&1 || echo "worker.sh: can't copy this log to $target" >&2
}

status() {
  local state=idle said=
  if [[ -e $root/job/pid ]]; then
    # In this order: a job that ends meanwhile has written its status.
    if is_running; then
      state=running
    elif [[ -e $root/job/status ]]; then
      state="exited $(cat "$root/job/status")"
      said=$(grep -a '^clp .*: error: ' "$root/job/log" | tail -n 1) || true
    else
      state=lost
    fi
    said=${said:-$(tail -n 1 "$root/job/log")}
  fi
  said=$(tr '\r' '\n' <<<"$said" | tail -n 1 | LC_ALL=C tr -cd '[:print:]')
  printf 'worker %s %s %s\n' "$(worker_number)" "$state" "${said:0:400}"
}

logs() {
  local lines=$1 follow=${2:-}
  tail -n "$lines" ${follow:+-F} "$root/job/log" |
    sed -u "s/^/[$(worker_number)] /"
}

stop() {
  local seconds=$1 pid
  is_running || return 0
  pid=$(cat "$root/job/pid")
  kill -TERM -- "-$pid" 2>/dev/null || true
  local end=$((SECONDS + seconds))
  while is_running && ((SECONDS < end)); do
    sleep 0.2
  done
  if is_running; then
    kill -KILL -- "-$pid" 2>/dev/null || true
  fi
}

case ${1:-} in
  setup | start | supervise | status | logs | stop) "$@" ;;
  *)
    sed -n 's/^# \{0,1\}//; 2,19p' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
