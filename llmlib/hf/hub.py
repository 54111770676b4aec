"""Checkpoints on the Hugging Face hub: which of their files are fetched, and what to do when one can't be."""

from glob import escape
from pathlib import Path

from llmlib.errors import CheckpointError
from llmlib.hf.checkpoint import INDEX, SINGLE, shards

DESCRIPTION = ("*.json", "*.model", "*.txt")  # config, index and tokenizer: everything but weights
_SECOND_COPIES = ("*/*", "consolidated*", "pytorch_model*")  # the same weights again, in other formats

_REMEDIES = {
    "GatedRepoError": "its owner asks for consent: accept the terms at https://huggingface.co/{name}, then run "
    "`hf auth login`, or set HF_TOKEN",
    "RepositoryNotFoundError": "the hub has no public model of this name: check the spelling, owner/name; for a "
    "private one run `hf auth login`, or set HF_TOKEN",
    "RevisionNotFoundError": "it has no such revision: see the branches at https://huggingface.co/{name}/tree/main",
    "LocalEntryNotFoundError": "the hub can't be reached and no whole copy is in the cache: connect to a network, and "
    "unset HF_HUB_OFFLINE where it is set",
}


def fetch(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """The folder in the hub's cache with those files of a model that fit the patterns; what is there isn't fetched.

    name      owner/name, as in the address of the model's page; revision  a branch, tag or commit (None: main)
    Raises CheckpointError, with the remedy, where the files can be had neither from the hub nor from its cache.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"there is no folder {name}; to fetch {name!r} from the hub: pip install huggingface_hub"
        ) from None
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(_SECOND_COPIES)
            )
        )
    except Exception as error:  # noqa: BLE001  (the hub's client raises whatever its transport does)
        raise CheckpointError(_explained(error, name, revision)) from None


def fetch_weights(name: str, folder: Path) -> None:
    """Fetch the safetensors of a model whose description is in `folder`: those that its index names, or the only one.

    The folder's name is the commit it was fetched at, so that config and weights are of one commit.
    """
    index = folder / INDEX
    if index.exists():
        fetch(name, folder.name, tuple(map(escape, shards(index))))
        return
    for pattern in (SINGLE, "*.safetensors"):
        fetch(name, folder.name, (*DESCRIPTION, pattern))  # the client would warn of patterns that nothing fits
        if any(folder.glob("*.safetensors")):
            return
    raise CheckpointError(
        f"{name!r} has no safetensors on the hub, and pickled weights, which can run any code, are never fetched: look "
        f"for a revision or a copy of the model that has them"
    )


def _explained(error: Exception, name: str, revision: str | None) -> str:
    kinds = (kind.__name__ for kind in type(error).__mro__)
    remedy = next((_REMEDIES[kind] for kind in kinds if kind in _REMEDIES), "try again, it goes on where it stopped")
    what = repr(name) if revision is None else f"revision {revision!r} of {name!r}"
    reason = (str(error).splitlines() or ["no reason given"])[0]
    return (
        f"there is no folder {name}, and {what} couldn't be fetched from the hub: {remedy.format(name=name)}. Or give "
        f"the path of a folder with config.json and {SINGLE} ({type(error).__name__}: {reason})"
    )
