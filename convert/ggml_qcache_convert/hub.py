"""A checkpoint by its name on the Hugging Face Hub: the files the converter reads, in huggingface_hub's cache."""

import re
from collections.abc import Iterable
from pathlib import Path

from .checkpoint import WEIGHT_FILES, weight_map
from .errors import ConversionError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SMALL = ("*.json", "*.jinja", "tokenizer.model", "merges.txt")


def is_hub_id(model: str) -> bool:
    """Whether a text could name a model on the Hub, as ``llava-hf/llava-1.5-7b-hf`` does. A path that exists is no id."""
    return _ID.fullmatch(model) is not None and not model.endswith(".gguf") and not Path(model).exists()


def fetch(repo_id: str, revision: str | None = None, progress: bool = False) -> Path:
    """Downloads a checkpoint: configuration, tokenizer, and its weights in one format.

    What is in the cache already isn't downloaded again; a connection that breaks off is taken up where it ended. When the Hub
    can't be reached, the cache alone has to do.

    Args:
        repo_id: Name on the Hub.
        revision: Branch, tag or commit; the main branch by default.
        progress: Show progress bars on stderr.

    Returns:
        The directory of the snapshot in the cache.

    Raises:
        ConversionError: No such model or revision, no access to it, or the Hub can't be reached and the cache hasn't got it.
    """
    from huggingface_hub import utils

    silenced = not progress and not utils.are_progress_bars_disabled()
    if silenced:
        utils.disable_progress_bars()
    try:
        return _fetch(repo_id, revision)
    finally:
        if silenced:
            utils.enable_progress_bars()


def _fetch(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    api = HfApi()
    try:
        top = [file.rfilename for file in api.model_info(repo_id, revision=revision).siblings or () if "/" not in file.rfilename]
        first = _first_weights(repo_id, top)
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(_SMALL)))
        # the folder is named after its commit
        snapshot_download(repo_id, revision=folder.name, allow_patterns=_exactly(_weight_files(folder / first)))
        return folder
    except ConversionError:
        raise
    except GatedRepoError as error:
        raise ConversionError(
            f"{repo_id}: access to this model must be asked for at {api.endpoint}/{repo_id}, and then needs a token (`hf auth login`)"
        ) from error
    except RevisionNotFoundError as error:
        raise ConversionError(f"{repo_id}: the model at {api.endpoint} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise ConversionError(
            f"{repo_id}: no such file or directory, and no such model at {api.endpoint} (a private one needs a token: `hf auth login`)"
        ) from error
    except HFValidationError as error:
        raise ConversionError(f"{repo_id}: isn't the name of a model on the Hub: {error}") from error
    except Exception as error:  # the HTTP library, and with it its exceptions, depends on the version
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = " ".join(str(cause).split())[:200] or type(cause).__name__
        failed = f"{repo_id}: can't be fetched from {api.endpoint} ({reason})"
        try:
            folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(_SMALL), local_files_only=True))
        except OSError:
            raise ConversionError(f"{failed}, and the cache hasn't got it; no such file or directory either") from error
        first = _first_weights(repo_id, [path.name for path in folder.iterdir()])
        missing = [name for name in _weight_files(folder / first) if not (folder / name).exists()]
        if missing:
            raise ConversionError(f"{failed}, and the cache lacks {', '.join(missing)}; what it has isn't fetched again next time") from error
        return folder


def _first_weights(repo_id: str, names: list[str]) -> str:
    """The file or index of the format that a checkpoint prefers among those a repository has."""
    for single in WEIGHT_FILES:
        for name in (single, f"{single}.index.json"):
            if name in names:
                return name
    raise ConversionError(f"{repo_id}: has no weights: none of {', '.join(WEIGHT_FILES)}, whole or in shards")


def _weight_files(first: Path) -> list[str]:
    """That file, or the shards of that index."""
    return sorted(set(weight_map(first).values())) if first.suffix == ".json" else [first.name]


def _exactly(names: Iterable[str]) -> list[str]:
    """Patterns that match these names only."""
    return [re.sub(r"([*?[])", r"[\1]", name) for name in names]
