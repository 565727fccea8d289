import os
import tempfile

# Before anything of Hugging Face is imported: no test reads the network, or the caches of whoever runs it.
CACHE = tempfile.TemporaryDirectory(prefix="palme-xt-tests-")
os.environ |= {"HF_HOME": CACHE.name, "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}

import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# Tiny tensors gain nothing from threads, and lose much when the machine is shared.
torch.set_num_threads(1)

# Deterministic, so that a red suite is red for everyone; `--hypothesis-seed` and the profile "explore" look further.
settings.register_profile(
    "default", deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("explore", deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")
