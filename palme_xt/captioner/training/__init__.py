"""The training run: its loop, its processes, its folder."""
