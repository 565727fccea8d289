"""PalmE on the Hugging Face hub: saved, loaded and pushed as other models are."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
from huggingface_hub import HfApi, ModelCard, ModelHubMixin, snapshot_download

from palme_xt import model
from palme_xt.storage import folder as pretrained
from palme_xt.storage.card import model_card
from palme_xt.storage.folder import CARD, COMPANIONS, CONFIG, TRAINING, WEIGHTS, PretrainedError


class PalmE(model.PalmE, ModelHubMixin):
    """`palme_xt.PalmE`, which it is in all else, that the hub can hold.

        model = PalmE.from_pretrained("user/name")  # or a folder, a training run's too
        model.save_pretrained("folder")
        model.push_to_hub("user/name")
        captions = palme_xt.captioner.caption.caption(model, img)  # img (b, c, h, w): list of b str

    Attributes:
        companions: files beside the weights, by name, that it was loaded with and is saved with: the tokenizer's, the
            preprocessing's, the model card. Each of `palme_xt.storage.folder.COMPANIONS` may be put there. The card is
            that of the loaded weights: after training on, `model.companions = {}`, or those but README.md, for a new
            one.
        how_trained: what `config.json` says under "training", saved again; None for a model that was not loaded.
    """

    companions: Mapping[str, bytes] = MappingProxyType({})
    how_trained: Mapping[str, Any] | None = None

    # The mixin's own reads config.json itself, with raw errors, takes what it finds there for keywords, and goes on
    # without one (huggingface_hub 0.21 to 2.4 at least), so that `_from_pretrained` comes too late.
    @classmethod
    def from_pretrained(  # type: ignore[override]  # no keywords that replace arguments: the weights would not fit
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        device: str | torch.device = "cpu",
    ) -> Self:
        """The model in a folder, or in a repository of the hub, in eval mode.

        Weights are read from safetensors alone, and cast to the dtypes that a new model has. The arguments on download
        mean nothing for a folder.

        Args:
            pretrained_model_name_or_path: a folder here, or else "user/name" on the hub.
            force_download: download again what the cache has.
            token: for the hub; by default, that of `hf auth login`.
            cache_dir: of downloads; by default, huggingface_hub's.
            local_files_only: take the repository from the cache, without network.
            revision: branch, tag or commit of the repository; by default, `main`.
            device: of the model.

        Raises:
            PretrainedError: neither a folder here nor a repository that can be read, or one that holds no model, or
                whose files are damaged or do not belong together.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.exists():
            folder = _download(
                str(pretrained_model_name_or_path),
                force_download=force_download,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                revision=revision,
            )
        loaded = pretrained.load_as(cls, folder, device)
        loaded.companions = pretrained.read_companions(folder)
        loaded.how_trained = pretrained.read_json(folder).get(TRAINING)
        return loaded

    # The mixin's own deletes config.json before there is a new one.
    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        config: Any = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write `config.json`, `model.safetensors` and the companions into a folder, over those that are there.

        A README.md that is there already stays, as huggingface_hub has it; so does a companion that this model has no
        other for. After an error the files in it are as they were.

        Args:
            save_directory: the folder, made where it is missing.
            config: None: it is the model's own.
            repo_id: with `push_to_hub`, the repository; by default, the folder's name.
            push_to_hub: push it as well.
            model_card_kwargs: for `generate_model_card`, whose card then replaces one that the model was loaded with.
            **push_to_hub_kwargs: for `push_to_hub`.

        Returns:
            The URL of the commit with `push_to_hub=True`, else None.

        Raises:
            PretrainedError: the folder cannot be written.
            ValueError: `config` is not None.
            TypeError: an argument of the model has no JSON form.
        """
        if config is not None:
            raise ValueError("config must be None: the weights are saved with the arguments that they belong to")
        companions = dict(self.companions)
        if (Path(save_directory) / CARD).exists():
            companions.pop(CARD, None)
        elif CARD not in companions or model_card_kwargs is not None:
            companions[CARD] = str(self.generate_model_card(**model_card_kwargs or {})).encode()
        pretrained.save(self, save_directory, self.how_trained, companions)
        if not push_to_hub:
            return None
        name = repo_id or Path(save_directory).name
        return self.push_to_hub(name, model_card_kwargs=model_card_kwargs, **push_to_hub_kwargs)

    # The mixin's own saves into a folder of its choice, without saying for which repository.
    def push_to_hub(self, repo_id: str, *, model_card_kwargs: dict[str, Any] | None = None, **how: Any) -> str:
        """Upload what `save_pretrained` writes, in one commit, to a repository made where it is missing.

        Args:
            repo_id: "user/name", or "name" of one's own.
            model_card_kwargs: as in `save_pretrained`.
            **how: for `huggingface_hub.ModelHubMixin.push_to_hub`.

        Returns:
            The URL of the commit.
        """
        if "/" in repo_id and (CARD not in self.companions or model_card_kwargs is not None):
            model_card_kwargs = {"repo_id": repo_id} | (model_card_kwargs or {})
        return super().push_to_hub(repo_id, model_card_kwargs=model_card_kwargs, **how)

    def generate_model_card(self, metrics: Mapping[str, Any] | None = None, repo_id: str | None = None) -> ModelCard:
        """A new card, whatever the model was loaded with: `palme_xt.storage.card`, with these arguments."""
        parameters = sum(parameter.numel() for parameter in self.parameters())
        return ModelCard(model_card(self.config, self.how_trained, metrics, parameters=parameters, repo_id=repo_id))


def _download(name: str, *, token: str | bool | None, local_files_only: bool, revision: str | None, **how: Any) -> Path:
    try:
        folder = Path(
            snapshot_download(
                name,
                token=token,
                local_files_only=local_files_only,
                revision=revision,
                allow_patterns=[CONFIG, WEIGHTS, *COMPANIONS],
                **how,
            )
        )
    except Exception as error:  # what the transport raises depends on the release of huggingface_hub
        why = " ".join(str(error).split()) or type(error).__name__
        message = f"{name} is neither a folder here nor a repository of the hub that can be read: {why}"
        raise PretrainedError(message) from error
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if not {CONFIG, WEIGHTS} <= set(names) and not local_files_only:
        with contextlib.suppress(Exception):  # without the names of its other files, the error says less
            names = HfApi(token=token).list_repo_files(name, revision=revision)
    pretrained.check_files(f"{name} on the hub", names)
    return folder
