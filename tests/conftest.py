import torch
from hypothesis import HealthCheck, settings

# Tiny tensors gain nothing from threads, and lose much when the machine is shared.
torch.set_num_threads(1)

# Deterministic, so that a red suite is red for everyone; `--hypothesis-seed` and the profile "explore" look further.
settings.register_profile(
    "default", deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("explore", deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")
