import os
import tempfile

# Set this before importing any Hugging Face library: no test uses the network or the user's caches.
CACHE = tempfile.TemporaryDirectory(prefix="palme-xt-tests-")
os.environ |= {"HF_HOME": CACHE.name, "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}

import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# Tiny tensors gain nothing from threads, and lose much when the machine is shared.
torch.set_num_threads(1)

# Deterministic, so that failures are the same for everyone. `--hypothesis-seed` and the profile "explore" search more.
settings.register_profile(
    "default", deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("explore", deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")
