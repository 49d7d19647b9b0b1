# SPDX-License-Identifier: Apache-2.0
"""Models of the Hugging Face hub by their name, org/name: downloads what is read of them."""

import contextlib
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

# What is read beside weights, and the indices that say which files hold those.
_SMALL = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "*.safetensors.index.json",
]
# The patterns' stars cross slashes: some models keep their weights again in a folder, in the form
# of their makers, or in `consolidated` files.
_NOT_READ = ["*/*.json", "*/*.safetensors", "consolidated*.safetensors"]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


def is_name(model: object) -> bool:
    """Whether this is how the hub names models: "org/name". A path may look so too."""
    return isinstance(model, str) and _NAME.fullmatch(model) is not None


def download(name: str) -> pathlib.Path:
    """Returns the directory of a model in the hub's cache, with whatever is missing downloaded.

    Config, tokenizer, chat templates and safetensors are, of these the files that count by the rule
    of `models.checkpoint`. What the hub's library is told by its environment variables (HF_HOME,
    HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE) holds. Without a network, what is there already serves.

    Args:
      name: as "org/name".

    Raises:
      FileNotFoundError: if the model cannot be had; one line that says why, and what else to do.
    """
    with _told(name):
        from huggingface_hub import snapshot_download

        folder = pathlib.Path(
            snapshot_download(name, allow_patterns=_SMALL, ignore_patterns=_NOT_READ)
        )
        named = _weights(folder)
        # By its commit: the name may mean another by now.
        snapshot_download(
            name,
            revision=folder.name,
            allow_patterns=[*_SMALL, *(named or ["*.safetensors"])],
            ignore_patterns=_NOT_READ[:1] if named else _NOT_READ,
        )
        return folder


def download_config(name: str) -> pathlib.Path:
    """Returns a directory with the config.json of a model, which alone is downloaded.

    Args, Raises: as `download`.
    """
    with _told(name):
        from huggingface_hub import hf_hub_download

        return pathlib.Path(hf_hub_download(name, "config.json")).parent


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """Turns what goes wrong with a download into one line."""
    try:
        yield
    except Exception as e:  # of HTTP, of the hub's library, of a disk that is full
        raise FileNotFoundError(
            f"{name!r} is no directory here, and could not be had from the Hugging Face hub: "
            f"{_reason(name, e)}. To load a model from a directory, pass the directory's path"
        ) from e


def _weights(folder: pathlib.Path) -> list[str]:
    """The files that hold the weights as far as something names them."""
    config = _read(folder / "config.json")
    source = config.get("transformers_weights") or "model.safetensors.index.json"
    index = _read(folder / str(source)) if str(source).endswith(".json") else {}
    files = index.get("weight_map")
    # Where a model.safetensors stands beside an index, it counts.
    named = set(files.values()) | {"model.safetensors"} if isinstance(files, dict) else {source}
    return sorted(str(file) for file in named if str(file).endswith(".safetensors"))


def _read(path: pathlib.Path) -> dict[str, Any]:
    """What a JSON file has; nothing where it is missing or wrong, of which loading will tell."""
    try:
        fields = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _reason(name: str, error: Exception) -> str:
    """Why it could not be had, in a few words."""
    if isinstance(error, ImportError):
        return f"the package huggingface_hub is not there ({error}); pip install huggingface_hub"
    kinds = {cause.__name__ for cause in type(error).__mro__}
    cause: BaseException | None = error
    while cause is not None:
        if type(cause).__name__ == "OfflineModeIsEnabled":
            return "HF_HUB_OFFLINE is set, and its cache does not hold the model"
        cause = cause.__cause__
    if "GatedRepoError" in kinds:
        return f"its licence is to be accepted on the hub's page of {name}, and HF_TOKEN to be set"
    if "RepositoryNotFoundError" in kinds:
        return "the hub has no such model, or it is private and HF_TOKEN is not set"
    if "LocalEntryNotFoundError" in kinds:
        of = error.__cause__ or error
        return f"no network, and its cache does not hold the model ({_line(of)})"
    return _line(error)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".removesuffix(": ")
