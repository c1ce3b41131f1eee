#!/usr/bin/env bash
# Starts a training job on a Cloud TPU slice and keeps it going; see `usage`.
#
# A slice is a queued resource with one node of the same name. Every command of
# gcloud and its flags are those of the reference of Google Cloud CLI 558.0.0
# (February 2026), generally available track:
#   https://cloud.google.com/sdk/gcloud/reference/compute/tpus
# What happens on a worker is worker.sh, which comes with the archive.
#
# It also runs under the bash 3.2 of macOS: no associative arrays, no mapfile.
set -euo pipefail

usage() {
  cat <<'EOF'
Starts a training job on a Cloud TPU slice and keeps it going.

usage: launch/tpu.sh COMMAND NAME [options]

  create NAME --zone ZONE --accelerator-type TYPE [--spot] [--project ID]
         [--runtime-version V] [-- GCLOUD_FLAG...]
      Asks for a slice, such as v5litepod-16: on demand, or with --spot from
      spare capacity that may be taken back. Settings are kept under NAME; the
      other commands find them there. What follows -- goes to `gcloud compute
      tpus queued-resources create`: --reserved, --network, --service-account...
  setup NAME [--poll SECONDS]
      Waits for the slice and installs the checkout's last commit on every
      worker, all from one archive.
  run NAME --output gs://BUCKET/FOLDER [--run-name RUN] [--max-restarts N]
         [--backoff SECONDS] [--poll SECONDS] [--grace SECONDS] [--shared]
         -- train --config FILE [--config.FIELD=VALUE...]
      Runs `clp train ...` on all workers, into FOLDER/RUN (RUN is NAME unless
      given), and watches it. Waits for the slice and sets it up where that is
      still to be done. When the slice is preempted or a worker dies, brings it
      back, from the same archive, and starts the same command again, which
      resumes from the newest checkpoint. The job does not need this watcher:
      start the same command again to go on watching.
        --max-restarts 20  give up after so many
        --backoff 30       pause before a restart; doubles, up to 600 s, while
                           restarts follow within 10 minutes
        --poll 30          between looks at the workers
        --grace 300        how long workers may go on when one has ended
        --shared           FOLDER is not gs:// but a path at which every worker
                           mounts the same file system (Filestore, NFS)
      Several workers write one folder and a spot slice's disks are lost with
      it: only a single on-demand worker may write to its own disk.
      The workers' logs are kept in FOLDER/RUN/logs/TIME/worker-N.log, compiled
      programs in FOLDER/compilation_cache.
  status NAME
      The state of the slice and of the job on every worker.
  logs NAME [--worker N|all] [--lines N] [--follow]
      The output of the job on a worker: 0, and 100 lines, unless given.
  delete NAME
      Stops the job, which saves what it has, and deletes the slice. Outputs
      stay. It is no error when there is nothing to delete.

  --dry-run, with any command, prints the gcloud commands and runs none.
  --zone and --project name the slice where no settings are kept.

examples:
  launch/tpu.sh create clp-1 --zone us-west4-a --accelerator-type v5litepod-16 \
    --spot
  launch/tpu.sh run clp-1 --output gs://my-bucket/runs -- \
    train --config configs/demo.py --config.train.steps=1000
  launch/tpu.sh logs clp-1 --worker all --follow
  launch/tpu.sh delete clp-1

Needs gcloud, logged in, and for several workers the key of its ssh in your
agent: ssh-add ~/.ssh/google_compute_engine

exit status: 0 done; 1 failed; 2 bad arguments, or a bad config of the run.
EOF
}

# How long to bear with a gcloud that answers nothing, in polls.
readonly PATIENCE=20
readonly LONGEST_PAUSE=600 # seconds
readonly WORKER='bash clp_jax/source/launch/worker.sh'

say() {
  printf 'tpu.sh: %s\n' "$*" >&2
}

die() { # MESSAGE [STATUS]
  printf 'tpu.sh: error: %s\n' "$1" >&2
  exit "${2:-1}"
}

quote() {
  local quoted
  quoted=$(printf '%q ' "$@")
  printf '%s' "${quoted% }"
}

# ---------------------------------------------------------------- arguments

parse_arguments() {
  command=${1:-}
  case $command in
    create | setup | run | status | logs | delete) ;;
    -h | --help | help)
      usage
      exit 0
      ;;
    '')
      usage >&2
      exit 2
      ;;
    *) die "unknown command $command; see launch/tpu.sh --help." 2 ;;
  esac
  shift
  case ${1:-} in
    -h | --help)
      usage
      exit 0
      ;;
  esac
  name=${1:-}
  # What Google Cloud allows; it is also part of paths and commands.
  [[ $name =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
    die "after $command comes NAME: lower-case letters, digits and -, from a letter on; got '$name'." 2
  shift
  folder=${XDG_STATE_HOME:-$HOME/.local/state}/clp_jax/tpu/$name

  dry_run=0 zone='' project='' accelerator_type='' runtime_version='' spot=0
  output='' run_name=$name max_restarts=20 backoff=30 poll=30 grace=300
  shared=0 worker=0 lines=100 follow=0
  flags=() rest=()
  [[ $command == create ]] || load_settings
  while (($#)); do
    case $command:$1 in
      *:--dry-run) dry_run=1 ;;
      create:--spot) spot=1 ;;
      run:--shared) shared=1 ;;
      logs:--follow) follow=1 ;;
      *:--zone | *:--project | create:--accelerator-type | \
        create:--runtime-version | run:--output | run:--run-name | \
        run:--max-restarts | run:--backoff | run:--grace | run:--poll | \
        setup:--poll | \
        logs:--worker | logs:--lines)
        (($# >= 2)) || die "$1 needs a value." 2
        case $1 in
          --zone) zone=$2 ;;
          --project) project=$2 ;;
          --accelerator-type) accelerator_type=$2 ;;
          --runtime-version) runtime_version=$2 ;;
          --output) output=$2 ;;
          --run-name) run_name=$2 ;;
          --max-restarts) max_restarts=$2 ;;
          --backoff) backoff=$2 ;;
          --poll) poll=$2 ;;
          --grace) grace=$2 ;;
          --worker) worker=$2 ;;
          --lines) lines=$2 ;;
        esac
        shift
        ;;
      *:--[a-z]*=*)
        die "write ${1%%=*} and its value with a space between." 2
        ;;
      create:-- | run:--)
        shift
        rest=("$@")
        break
        ;;
      *) die "unknown argument $1 of $command; see launch/tpu.sh --help." 2 ;;
    esac
    shift
  done

  local value
  for value in "$max_restarts" "$backoff" "$grace" "$lines"; do
    [[ $value =~ ^[0-9]+$ ]] || die "expected a whole number, got '$value'." 2
  done
  [[ $poll =~ ^[0-9]+([.][0-9]+)?$ ]] ||
    die "--poll takes a number of seconds, got '$poll'." 2
  [[ $worker =~ ^([0-9]+|all)$ ]] ||
    die "--worker takes an index or all, got '$worker'." 2
  [[ -n $zone ]] || die "no settings are kept for $name; give --zone." 2
  where=(--zone="$zone")
  [[ -z $project ]] || where+=(--project="$project")
}

# One key=value a line; a line for each further flag of gcloud.
load_settings() {
  [[ -e $folder/settings ]] || return 0
  local line
  while IFS= read -r line; do
    case $line in
      zone=*) zone=${line#*=} ;;
      project=*) project=${line#*=} ;;
      accelerator_type=*) accelerator_type=${line#*=} ;;
      runtime_version=*) runtime_version=${line#*=} ;;
      spot=*) spot=${line#*=} ;;
      flag=*) flags+=("${line#*=}") ;;
    esac
  done <"$folder/settings"
}

print_settings() {
  printf '%s\n' "zone=$zone" "project=$project" "spot=$spot" \
    "accelerator_type=$accelerator_type" "runtime_version=$runtime_version"
  ((${#flags[@]} == 0)) || printf 'flag=%s\n' "${flags[@]}"
}

# How many workers a slice has. v2 to v4 and v5p count cores, 8 a worker; v5e
# and v6e count chips, 4 a worker, or all on one up to 8.
hosts_of() { # TYPE
  local size=${1##*-}
  if [[ $size =~ ^[1-9][0-9]*$ ]]; then
    case $1 in
      v2-* | v3-* | v4-* | v5p-*)
        echo $((size <= 8 ? 1 : size / 8))
        return
        ;;
      v5litepod-* | v6e-*)
        echo $((size <= 8 ? 1 : size / 4))
        return
        ;;
    esac
  fi
  die "unknown accelerator type '$1'; expected v4-N, v5litepod-N, v5p-N or v6e-N." 2
}

# https://cloud.google.com/tpu/docs/runtimes
runtime_of() { # TYPE
  case $1 in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

require_settings() {
  [[ -n $accelerator_type ]] ||
    die "no settings are kept for $name on this machine; start with launch/tpu.sh create $name." 2
  hosts=$(hosts_of "$accelerator_type")
}

# ---------------------------------------------------------------- the cloud

# gcloud, or under --dry-run its command line. Its standard input is closed: ssh
# would eat what the script reads.
cloud() {
  if ((dry_run)); then
    printf 'gcloud %s\n' "$(quote "$@")"
  else
    gcloud "$@" </dev/null
  fi
}

queued_resources() { # VERB ARGUMENT...
  local verb=$1
  shift
  cloud compute tpus queued-resources "$verb" "$name" "${where[@]}" "$@"
}

on_workers() { # WORKER COMMAND
  cloud compute tpus tpu-vm ssh "$name" "${where[@]}" --quiet --worker="$1" \
    --command="$2"
}

# Prints a field of the slice, or NOT_FOUND; 1 when gcloud can't say.
describe() { # KIND FIELD
  mkdir -p "$folder"
  if gcloud compute tpus "$1" describe "$name" "${where[@]}" \
    --format="value($2)" </dev/null 2>"$folder/stderr"; then
    return 0
  elif grep -q NOT_FOUND "$folder/stderr"; then
    echo NOT_FOUND
  else
    cat "$folder/stderr" >&2
    return 1
  fi
}

# Prints the slice's state: the queued resource's, or LOST when that still says
# ACTIVE but its machines are gone.
slice_state() {
  local state node
  state=$(describe queued-resources state.state) || return 1
  if [[ $state == ACTIVE ]]; then
    node=$(describe tpu-vm state) || return 1
    case $node in
      PREEMPTED | TERMINATED | STOPPED | NOT_FOUND) state=LOST ;;
    esac
  fi
  echo "$state"
}

create_slice() {
  say "asking for $accelerator_type in $zone"
  local tier=()
  ((!spot)) || tier=(--spot)
  queued_resources create --node-id="$name" \
    --accelerator-type="$accelerator_type" \
    --runtime-version="$runtime_version" \
    ${tier[@]+"${tier[@]}"} ${flags[@]+"${flags[@]}"} || return 1
  removed=0
}

remove_slice() {
  queued_resources delete --force --quiet || return 1
  removed=1
}

# Waits until the slice is there; 1 when it never will be.
wait_for_slice() {
  local state last='' misses=0
  while :; do
    if state=$(slice_state); then
      misses=0
      [[ $state == "$last" ]] || say "$name is $state"
      last=$state
      case $state in
        ACTIVE) return 0 ;;
        FAILED | SUSPENDING | SUSPENDED | DELETING | LOST | NOT_FOUND) return 1 ;;
      esac
    else
      misses=$((misses + 1))
      ((misses < PATIENCE)) || die "gcloud can't describe $name; see above."
    fi
    sleep "$poll"
  done
}

# Makes the slice exist, replaces one that was preempted, and waits for it.
bring_up() {
  local state last=''
  while :; do
    state=$(slice_state) || return 1
    case $state in
      SUSPENDING | DELETING) ;; # can't be deleted, or its name be used, yet
      *) break ;;
    esac
    [[ $state == "$last" ]] || say "$name is $state"
    last=$state
    sleep "$poll"
  done
  case $state in
    ACTIVE) return 0 ;;
    NOT_FOUND)
      # Somebody's wish, unless this very process was about to replace it.
      if ((started && !removed)); then
        outcome=deleted
        return 1
      fi
      create_slice || return 1
      ;;
    FAILED | SUSPENDED | LOST)
      say "$name is $state; replacing it"
      remove_slice && create_slice || return 1
      ;;
  esac
  wait_for_slice
}

# ---------------------------------------------------------------- the workers

make_archive() {
  local checkout
  checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  commit=$(git -C "$checkout" rev-parse HEAD 2>/dev/null) ||
    die "$checkout is not a git checkout; the archive is made of its last commit."
  [[ -z $(git -C "$checkout" status --porcelain) ]] ||
    say "what is not committed in $checkout is not in the archive"
  say "archive of commit ${commit:0:12}"
  if ((!dry_run)); then
    mkdir -p "$folder"
    git -C "$checkout" archive --format=tar.gz \
      --output="$folder/source.tar.gz" HEAD
    echo "$commit" >"$folder/commit"
  fi
}

# Makes the archive, or keeps the one that this slice's jobs have been run from.
keep_archive() {
  local checkout
  if [[ ! -e $folder/source.tar.gz ]]; then
    make_archive
    return
  fi
  checkout=$(dirname "${BASH_SOURCE[0]}")
  commit=$(cat "$folder/commit")
  [[ $(git -C "$checkout" rev-parse HEAD 2>/dev/null) == "$commit" ]] ||
    say "from the archive of commit ${commit:0:12}; launch/tpu.sh setup $name makes one of the checkout's last commit"
}

# Whether every worker has the archive's commit installed.
is_installed() {
  local found
  commit=$(cat "$folder/commit") || return 1
  found=$(on_workers all 'cat clp_jax/installed 2>/dev/null || echo none') ||
    return 1
  (($(grep -c "^$commit\$" <<<"$found") == hosts))
}

install_everywhere() {
  say "installing on $hosts worker(s)"
  cloud compute tpus tpu-vm scp "$folder/source.tar.gz" \
    "$name:clp_jax.tar.gz" "${where[@]}" --quiet --worker=all || return 1
  on_workers all "mkdir -p clp_jax && \
{ flock --timeout 5 clp_jax/lock rm -rf clp_jax/source || \
{ echo 'a job is running; delete the slice or wait' >&2; exit 1; }; } && \
mkdir clp_jax/source && tar -xzf clp_jax.tar.gz -C clp_jax/source && \
$WORKER setup $commit"
}

start_everywhere() {
  say "starting on $hosts worker(s), output in $output/$run_name"
  on_workers all "$WORKER start $(quote \
    "$output/$run_name/logs/$(date -u +%Y%m%dT%H%M%SZ)" \
    "$output/compilation_cache" "${job[@]}")"
}

# Fills in `report`, a line of worker.sh a worker; 1 when one does not answer.
ask_workers() {
  report=$(on_workers all "$WORKER status" 2>"$folder/stderr") || return 1
  report=$(grep '^worker ' <<<"$report" | sort -k 2n) || return 1
  (($(grep -c . <<<"$report") == hosts))
}

# The workers' states in `report`: running, lost, idle or an exit status.
states() {
  awk '{ print $3 == "exited" ? $4 : $3 }' <<<"$report"
}

# Watches until the job has ended on every worker and sets `outcome`: done,
# interrupted (start it again), failed or refused (1 or 2 of `clp`), deleted.
watch_workers() {
  local misses=0 shown last='' running first_end='' ended='' report
  while :; do
    sleep "$poll"
    if ! ask_workers; then
      misses=$((misses + 1))
      case $(slice_state || true) in
        ACTIVE | '')
          ((misses < PATIENCE)) ||
            die "the workers of $name don't answer: $(tail -n 1 "$folder/stderr") The job may be going on; start the same command to watch it."
          continue
          ;;
        NOT_FOUND | DELETING) outcome=deleted ;;
        *) outcome=interrupted ;;
      esac
      return
    fi
    misses=0
    running=$(states | grep -cx running) || true
    shown="$running of $hosts running; $(head -n 1 <<<"$report")"
    [[ $shown == "$last" ]] || say "$shown"
    last=$shown
    if ((running == 0)); then
      break
    elif ((running < hosts)); then
      # JAX ends the others too, but not from every state.
      first_end=${first_end:-$SECONDS}
      if ((SECONDS - first_end >= grace)); then
        say "stopping the others"
        ended=$(states | grep -vx running)
        on_workers all "$WORKER stop 60" || true
      fi
    fi
  done

  # What is the cause, and what its consequence? A worker whose peer is gone
  # ends with JAX's abort (134), or fails (1) in what both had to do.
  ended=${ended:-$(states)}
  if ! states | grep -qvx 0; then
    outcome='done'
  elif grep -qx 2 <<<"$ended"; then
    outcome=refused
  elif grep -vx 134 <<<"$ended" |
    grep -Eqx 'lost|idle|75|1[2-9][0-9]|2[0-9][0-9]'; then
    outcome=interrupted
  elif grep -qx 1 <<<"$ended" && [[ $(slice_state) == ACTIVE ]]; then
    outcome=failed
  else
    outcome=interrupted
  fi
  [[ $outcome == 'done' ]] || printf '%s\n' "$report" >&2
}

# ---------------------------------------------------------------- commands

create() {
  flags=(${rest[@]+"${rest[@]}"})
  require_settings
  [[ -n $runtime_version ]] || runtime_version=$(runtime_of "$accelerator_type")
  if ((dry_run)); then
    create_slice
    return
  fi
  local state
  state=$(slice_state) || exit 1
  if [[ $state != NOT_FOUND && -e $folder/settings ]] &&
    [[ $(print_settings) != "$(cat "$folder/settings")" ]]; then
    die "$name exists with other settings; delete it first, or choose another name."
  fi
  mkdir -p "$folder"
  print_settings >"$folder/settings"
  if [[ $state != NOT_FOUND ]]; then
    say "$name exists; it is $state"
  elif ! create_slice; then
    rm "$folder/settings"
    die "gcloud did not accept the request; see above."
  fi
}

setup() {
  require_settings
  make_archive
  if ((!dry_run)); then
    wait_for_slice ||
      die "$name can't be set up; launch/tpu.sh run replaces a slice that was preempted, create asks for a new one."
  fi
  install_everywhere || die "the installation failed; see above."
}

run() {
  require_settings
  output=${output%/}
  if [[ $output != gs://?* ]]; then
    [[ $output == /* ]] ||
      die "--output takes gs://BUCKET/FOLDER or, with --shared, an absolute path; got '$output'." 2
    if ((!shared && hosts > 1)); then
      die "$hosts workers write one output folder: give --output gs://BUCKET/FOLDER, or --shared when all of them mount the same file system at $output." 2
    elif ((!shared && spot)); then
      die "the disks of a spot slice are lost with it: give --output gs://BUCKET/FOLDER, or --shared when $output is a mounted file system." 2
    fi
  fi
  [[ $run_name =~ ^[A-Za-z0-9][-._A-Za-z0-9]*$ ]] ||
    die "--run-name takes letters, digits, '-', '_' and '.'; got '$run_name'." 2
  ((${#rest[@]})) || die "give the job after --, as in: -- train --config FILE." 2
  local argument
  for argument in "${rest[@]}"; do
    case $argument in
      --workdir | --workdir=* | --distributed | --coordinator* | \
        --num-processes* | --process-id*)
        die "$argument is tpu.sh's to give: the folder is --output/--run-name." 2
        ;;
    esac
  done
  job=("${rest[@]}" --workdir "$output/$run_name")
  ((hosts == 1)) || job+=(--distributed --num-processes "$hosts")

  started=0 removed=0
  if ((dry_run)); then
    create_slice
    make_archive
    install_everywhere
    start_everywhere
    on_workers all "$WORKER status"
    return
  fi
  keep_archive
  trap 'say "no longer watching; the job goes on"; exit 130' INT
  local restarts=0 pause=$backoff began
  while :; do
    outcome=interrupted
    began=$SECONDS
    if bring_up && { is_installed || install_everywhere; } &&
      start_everywhere; then
      started=1
      began=$SECONDS
      watch_workers
    elif ((!started)); then
      # A slice that is there, or that nobody would give, is no preemption.
      case $(slice_state) in
        ACTIVE | NOT_FOUND) die "the job was not started; see above." ;;
      esac
    fi
    [[ -e $folder/settings ]] || outcome=deleted
    case $outcome in
      done)
        say "done: $output/$run_name"
        return
        ;;
      deleted) die "$name was deleted; what was saved is in $output/$run_name." ;;
      refused) die "the run was refused; see above." 2 ;;
      failed) die "the run failed; see above and launch/tpu.sh logs $name." ;;
    esac
    ((restarts < max_restarts)) ||
      die "interrupted again after $restarts restarts; what was saved is in $output/$run_name. Start the same command to go on."
    restarts=$((restarts + 1))
    ((SECONDS - began < 600)) || pause=$backoff
    say "interrupted; restart $restarts of $max_restarts in $pause s"
    sleep "$pause"
    pause=$((pause * 2))
    ((pause <= LONGEST_PAUSE)) || pause=$LONGEST_PAUSE
  done
}

status() {
  local state=ACTIVE
  if ((!dry_run)); then
    state=$(slice_state) || exit 1
    echo "$name $state"
  fi
  [[ $state != ACTIVE ]] ||
    on_workers all "test ! -e clp_jax/installed || $WORKER status"
}

logs() {
  local how=$lines
  ((!follow)) || how="$lines follow"
  on_workers "$worker" "$WORKER logs $how"
}

delete() {
  local state=ACTIVE
  if ((!dry_run)); then
    state=$(slice_state) || exit 1
  fi
  # First of all: a watcher on this machine must not bring it back.
  ((dry_run)) || rm -f "$folder/settings" "$folder/source.tar.gz"
  case $state in
    NOT_FOUND)
      say "there is no $name"
      return
      ;;
    ACTIVE)
      on_workers all "test ! -e clp_jax/installed || $WORKER stop 120" ||
        say "the job could not be stopped; deleting the slice all the same"
      ;;
  esac
  remove_slice || die "$name could not be deleted; see above."
}

parse_arguments "$@"
((dry_run)) || command -v gcloud >/dev/null ||
  die "gcloud is not installed: https://cloud.google.com/sdk/docs/install"
"$command"
