"""Save PalmE to the Hugging Face Hub, and load it from there, like other models."""

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download

from palme_xt import model
from palme_xt.storage import folder as storage
from palme_xt.storage.card import model_card
from palme_xt.storage.files import explained
from palme_xt.storage.folder import CARD, COMPANIONS, CONFIG, TRAINING, WEIGHTS, Device, FolderError, PathLike


class PalmE(model.PalmE, ModelHubMixin):
    """`palme_xt.PalmE` with the methods of `huggingface_hub.ModelHubMixin`.

        model = PalmE.from_pretrained("user/name")  # or a folder, such as that of a training run
        model.save_pretrained("folder")
        model.push_to_hub("user/name")
        captions = palme_xt.captioner.caption.caption(model, img)  # img (b, c, h, w): list of b str

    The hooks `_from_pretrained` and `_save_pretrained` would run too late (huggingface_hub 0.34 to 2.4): before the
    mixin calls them, it passes the content of config.json on as keywords, with raw errors, and deletes config.json.

    Attributes:
        companions: Files beside the weights, by name, that the model was loaded with and is saved with: those of the
            tokenizer and of the preprocessing, and the model card. Names are those in
            `palme_xt.storage.folder.COMPANIONS`. The card describes the loaded weights: after further training, remove
            it, for example with `model.companions = {}`, so that a new one is written.
        how_trained: The content of `config.json` under "training", which is saved again; None if the model was not
            loaded.
    """

    companions: Mapping[str, bytes] = MappingProxyType({})
    how_trained: Mapping[str, Any] | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: PathLike,
        *,
        device: Device = "cpu",
        encoder: model.Encoder = "config",
        **download: Any,
    ) -> Self:
        """Return the model in a folder, or in a repository of the hub, in eval mode.

        Weights are read from safetensors only, and cast to the dtypes of a new model. For a folder, the arguments about
        downloads have no effect.

        Args:
            pretrained_model_name_or_path: A local folder, or "user/name" on the hub.
            device: Where to put the model.
            encoder: The encoder of a model that was built with `PalmE(encoder=module)`: a module of the same class and
                dimensions, which gets the saved weights.
            **download: Keywords of `huggingface_hub.snapshot_download`, such as `revision` (a branch, tag or commit),
                `token`, `cache_dir`, `force_download`, and `local_files_only` to read from the cache alone.

        Raises:
            TypeError: If there is another keyword.
            FolderError: If there is no such folder and no such repository that can be read, or if it does not hold a
                model, or if its files are damaged or do not belong together, or `encoder` is not the one that they
                belong to.
        """
        name = str(pretrained_model_name_or_path)
        inspect.signature(snapshot_download).bind(name, **download)
        folder = Path(name)
        if not folder.exists():
            with explained(f"{name} is neither a folder nor a repository on the hub that can be read", FolderError):
                folder = Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, *COMPANIONS], **download))
            storage.check_files(f"{name} on the hub", os.listdir(folder) if folder.is_dir() else [])
        loaded = storage.load_as(cls, folder, device, encoder)
        loaded.companions = storage.read_companions(folder)
        loaded.how_trained = storage.read_json(folder).get(TRAINING)
        return loaded

    def save_pretrained(
        self,
        save_directory: PathLike,
        *,
        config: Any = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write `config.json`, `model.safetensors` and the companions to a folder, replacing existing ones.

        An existing README.md is kept, as in huggingface_hub, and so is a companion that this model does not have. After
        an error, the files in the folder are unchanged.

        Args:
            save_directory: The folder, which is created if it does not exist.
            config: Must be None: the model's own config is saved.
            repo_id: The repository to push to. Defaults to the name of the folder.
            push_to_hub: Also push the model to the hub.
            model_card_kwargs: Keywords for `generate_model_card`. The new card replaces the one that the model was
                loaded with.
            **push_to_hub_kwargs: Keywords for `push_to_hub`.

        Returns:
            The URL of the commit if `push_to_hub=True`, otherwise None.

        Raises:
            FolderError: If the folder cannot be written.
            ValueError: If `config` is not None, or the model's own is unproven (see `PalmE.from_modules`).
            TypeError: If an argument of the model has no JSON form.
        """
        if config is not None:
            raise ValueError("config must be None: the weights are saved with the arguments that they belong to")
        companions = dict(self.companions)
        if (Path(save_directory) / CARD).exists():
            companions.pop(CARD, None)
        elif CARD not in companions or model_card_kwargs is not None:
            companions[CARD] = str(self.generate_model_card(**model_card_kwargs or {})).encode()
        storage.save(self, save_directory, self.how_trained, companions)
        if not push_to_hub:
            return None
        name = repo_id or Path(save_directory).name
        return self.push_to_hub(name, model_card_kwargs=model_card_kwargs, **push_to_hub_kwargs)

    # The mixin (huggingface_hub 0.34 to 2.4) does not pass the repository, which the card names, to `save_pretrained`.
    def push_to_hub(self, repo_id: str, *, model_card_kwargs: dict[str, Any] | None = None, **how: Any) -> str:
        """Upload what `save_pretrained` writes, in one commit, to a repository, which is created if it does not exist.

        Args:
            repo_id: "user/name", or "name" for one of your own repositories.
            model_card_kwargs: As in `save_pretrained`.
            **how: Keywords for `huggingface_hub.ModelHubMixin.push_to_hub`.

        Returns:
            The URL of the commit.

        Raises:
            ValueError: If the config of the model is unproven (see `PalmE.from_modules`).
            TypeError: If an argument of the model has no JSON form.
        """
        self.config.to_dict()  # what cannot be saved is rejected before a repository is created
        if "/" in repo_id and (CARD not in self.companions or model_card_kwargs is not None):
            model_card_kwargs = {"repo_id": repo_id} | (model_card_kwargs or {})
        return super().push_to_hub(repo_id, model_card_kwargs=model_card_kwargs, **how)

    def generate_model_card(self, metrics: Mapping[str, Any] | None = None, repo_id: str | None = None) -> ModelCard:
        """Return a new card for this model, whatever card it was loaded with. See `storage.card.model_card`."""
        parameters = sum(parameter.numel() for parameter in self.parameters())
        return ModelCard(model_card(self.config, self.how_trained, metrics, parameters=parameters, repo_id=repo_id))
