"""The loop, the processes and the folder of a training run."""
