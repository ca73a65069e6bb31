#!/bin/bash
# A run on the hosts of a Cloud TPU slice. From the repository's folder (what is committed), with gcloud set up:
#
#   tools/cluster/tpu.sh --name lm --zone us-east5-a --type v5p-32 --nfs 10.0.0.2:/share -- --config experiments/gpt_small.py
#
# Makes the slice, installs this on every host, mounts the share (Filestore, or another NFS) at the same place
# everywhere and starts lm.main on all hosts at once; jax reads from the TPU's metadata who the others are. The same
# command again goes on where the run was, on a new slice where that one was preempted. --dry_run prints the
# commands instead. What is given after -- goes to lm.main; data and caches belong on the share too, in ~/shared.
# `gcloud compute tpus tpu-vm delete NAME --zone ZONE` ends the costs.
set -euo pipefail

name=lm zone='' type='' nfs='' version='' dry=''
while [ $# -gt 0 ]; do
  case $1 in
    --name) name=$2; shift 2 ;;
    --zone) zone=$2; shift 2 ;;
    --type) type=$2; shift 2 ;;
    --nfs) nfs=$2; shift 2 ;;
    --version) version=$2; shift 2 ;;
    --dry_run) dry=1; shift ;;
    --) shift; break ;;
    *) echo "error: $1: use --name --zone --type --nfs --version --dry_run, then -- and flags of lm.main" >&2; exit 2 ;;
  esac
done
if [ -z "$zone" ] || [ -z "$type" ] || [ -z "$nfs" ] || [ $# = 0 ]; then
  echo "error: --zone, --type, --nfs and, after --, flags of lm.main are needed" >&2
  exit 2
fi
if [ -z "$version" ]; then  # of the system on the hosts; see `gcloud compute tpus versions list`
  case $type in
    v5p-*) version=v2-alpha-tpuv5 ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) version=tpu-ubuntu2204-base ;;
  esac
fi

vm=(gcloud compute tpus tpu-vm)
do_it() {
  if [ -n "$dry" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}
on_all() {
  do_it "${vm[@]}" ssh "$name" --zone "$zone" --worker all --command "$1"
}

state=PREEMPTED  # as a dry run takes it to be
if [ -z "$dry" ]; then
  state=$("${vm[@]}" describe "$name" --zone "$zone" --format 'value(state)') || state=''  # none is there
fi
case $state in
  READY) ;;
  '' | PREEMPTED | TERMINATED)
    if [ -n "$state" ]; then do_it "${vm[@]}" delete "$name" --zone "$zone" --quiet; fi
    do_it "${vm[@]}" create "$name" --zone "$zone" --accelerator-type "$type" --version "$version"
    ;;
  *) echo "error: $name is $state; try again when it is READY, or delete it" >&2; exit 1 ;;
esac
do_it git archive --format tar.gz --output lm.tar.gz HEAD
do_it "${vm[@]}" scp lm.tar.gz "$name:" --zone "$zone" --worker all
on_all 'mkdir -p lm && tar -xzf lm.tar.gz -C lm && pip install --quiet --user uv'
on_all '~/.local/bin/uv venv --quiet --clear --python 3.12 env'  # the system's own may be older than 3.11
on_all '~/.local/bin/uv pip install --quiet --python env/bin/python "./lm[tpu]"'
on_all "sudo apt-get install -qq nfs-common && mkdir -p shared && (mountpoint -q shared || sudo mount $nfs shared)"
on_all "cd lm && LM_CACHE_DIR=~/shared/cache ~/env/bin/python -m lm.main --workdir ~/shared/runs/$name $(printf '%q ' "$@")"
