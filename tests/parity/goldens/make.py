"""Make the goldens, folders of small models and what they compute: `python -m tests.parity.goldens.make`.

They were made with x-transformers 2.31.10 and torch 2.13.0. Make them again only to change a number, because
`tests/parity/test_drift.py` compares whatever is installed with these files.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from palme_xt.parity.drift import record_folder
from palme_xt.storage.folder import save
from tests.models import small

FOLDER = Path(__file__).parent
GOLDENS: dict[str, dict[str, Any]] = {
    "default_flags": {},
    "no_flash": {"attn_flash": False, "vit_kwargs": {"channels": 1}},
    "absolute_positions": {"use_abs_pos_emb": True, "rotary_xpos": False, "alibi_pos_bias": False},
    "text_only": {"cross_attend": False, "qk_norm": False},
    "grouped_gated_rmsnorm": {
        "decoder_kwargs": {"attn_kv_heads": 2, "ff_glu": True, "ff_swish": True, "use_rmsnorm": True},
        "vit_kwargs": {"num_register_tokens": 2},
    },
}


def main() -> None:
    for name, arguments in GOLDENS.items():
        model = small(encoder_dim=16, decoder_dim=16, **arguments)
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        save(model, FOLDER / name, {})
        record_folder(FOLDER / name)


if __name__ == "__main__":
    main()
