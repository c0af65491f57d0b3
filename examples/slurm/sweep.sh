#!/bin/bash
# Train with each of several values, each run a job of Slurm. Start it on a login node, in tmux or
# the like: it waits for the runs and ends with a table of them.
#
#     bash examples/slurm/sweep.sh experiment=kolmogorov64 data.path=flow.zarr \
#         trainer.learning_rate=1e-3,2e-3,4e-3 trainer.seed=0,1
#
# Run 3 is in SAVE_DIR/EXPERIMENT/SWEEP/3, its log in .submitit beside it. Needs
# `pip install 'ddo-modulus[sweep]'`. For arguments of Slurm that have no key here:
# +hydra.launcher.additional_parameters.KEY=VALUE.

TASKS="${TASKS:-1}"                  # processes of a run, one a GPU
CPUS="${CPUS:-8}"                    # of each process
MINUTES="${MINUTES:-240}"            # of one turn; the run goes on in the next
TURNS="${TURNS:-100}"                # at most
AT_ONCE="${AT_ONCE:-8}"              # runs
GPUS="${GPUS:-$TASKS}"               # of a run; 0 for none
PARTITION="${PARTITION:-null}"       # null: the cluster's default
export SAVE_DIR="${SAVE_DIR:-$PWD/runs}"

gpus=()
((GPUS == 0)) || gpus=("hydra.launcher.gpus_per_node=$GPUS")

# The signal comes two minutes before the end of a turn; the run saves its state, and submitit puts
# it back into the queue.
exec ddo train -m hydra/launcher=submitit_slurm \
    hydra.launcher.tasks_per_node="$TASKS" \
    hydra.launcher.cpus_per_task="$CPUS" \
    hydra.launcher.timeout_min="$MINUTES" \
    hydra.launcher.signal_delay_s=120 \
    hydra.launcher.max_num_timeout="$TURNS" \
    hydra.launcher.array_parallelism="$AT_ONCE" \
    hydra.launcher.partition="$PARTITION" \
    "${gpus[@]}" "$@"
