#!/bin/bash
# A run on a Slurm cluster, one process a GPU. From the repository's folder, with its environment active:
#
#   sbatch --nodes=2 tools/cluster/slurm.sh --config experiments/gpt_small.py --config.data.path=corpora/mine
#
# What is given after the script goes to lm.main; what is given before it overrides the lines below. jax finds the
# other processes from Slurm's variables. All nodes must see this folder, and LM_CACHE_DIR should be on a file
# system that they share. On CPU nodes: --gpus-per-node=0 and as many tasks as wanted.
#
# Before its time is over, or when it is preempted or requeued (scontrol requeue), the run gets SIGTERM, saves and
# ends with 75; it goes on in the same workdir, as after every other code that a new start may help. Requeued it has
# the KillWait of the cluster to save (30 s by default), else it goes on from its last checkpoint. scancel ends it,
# saved alike; so does a mistake (2), a divergence (3) or the end of the data (4).
#SBATCH --job-name=lm
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=lm-%j.log

trap '' TERM  # it is meant for the processes, for whose saving this script waits
# Since Slurm 22.05 srun does not know of itself how many CPUs a task has.
srun --label --cpus-per-task="$SLURM_CPUS_PER_TASK" python -u -m lm.main --workdir "runs/slurm-$SLURM_JOB_ID" "$@"
code=$?
echo "start ${SLURM_RESTART_COUNT:-0} ended with $code"
# A job that Slurm requeues by itself is no longer running here, nor is one that was cancelled.
case $code-$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) in
  0-* | 1-* | 2-* | 3-* | 4-* | 126-* | 127-* | 130-*) ;; # done, or for a person
  *-RUNNING)
    [ "${SLURM_RESTART_COUNT:-0}" -lt 100 ] && scontrol requeue "$SLURM_JOB_ID"
    ;;
esac
exit $code
