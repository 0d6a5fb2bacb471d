"""Hugging Face data: the files behind `hf:NAME`, and folders of `save_to_disk`. The one door to `datasets`.

In: a name. Out: data files at a pinned revision, to be cut and read like any other file; or the columns of a saved
dataset, some rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, Field

from pipeline.errors import UserError
from pipeline.files import expanded
from pipeline.untrusted import FileName, read_json

_BATCH_BYTES, _BATCH_ROWS = 4 * 2**20, 1024
_PROBE_SECONDS = 10
T = TypeVar("T")


def hub_files(name: str) -> list[tuple[str, Path]]:
    """Data files of the train split of `hf:NAME[:CONFIG][@REVISION]`: how each is called, and where it lies.

    Files of the hub are downloaded into its cache (what is there is not fetched again) and called by their address with
    the revision resolved, `hf://datasets/NAME@COMMIT/FILE`. NAME may be a local folder of data files. Raises
    `UserError` when the hub does not know the name or cannot be reached, or when its data is not laid out as our
    readers expect.
    """
    rest, _, revision = name.removeprefix("hf:").partition("@")
    path, _, config = rest.partition(":")
    folder = expanded(path)
    if folder.is_dir():
        path = str(folder.resolve())
    else:
        revision = _asked(name, lambda: _commit(path, revision or None))
    return _asked(name, lambda: _files(name, path, config, revision))


def _commit(path: str, revision: str | None) -> str:
    """One question with one answer: `datasets` alone would try for half a minute to reach a hub that is not there."""
    import huggingface_hub  # slow to import and seldom needed

    return str(huggingface_hub.HfApi().dataset_info(path, revision=revision, timeout=_PROBE_SECONDS).sha)


def _files(name: str, path: str, config: str, revision: str) -> list[tuple[str, Path]]:
    import datasets  # slow to import and seldom needed

    builder = datasets.load_dataset_builder(path, name=config or None, revision=revision or None)
    files = builder.config.data_files
    if not files or "train" not in files:
        raise UserError(f"{name} has no split 'train'; found {', '.join(map(str, files or ())) or 'no data files'}")
    separator, field = getattr(builder.config, "sep", None) or ",", getattr(builder.config, "field", None)
    if separator != "," or field:
        raise UserError(
            f"{name} wants to be read with {f'field {field!r}' if field else f'separator {separator!r}'}; "
            "wanted rows separated by commas, or objects that are not nested"
        )
    addresses = [str(file) for file in files["train"]]
    paths = datasets.DownloadManager().download(addresses)
    return [(address, Path(path)) for address, path in zip(addresses, paths, strict=True)]


@lru_cache(maxsize=4)
def load_saved(folder: str) -> Any:
    """The dataset of a `save_to_disk` folder; of several splits, train. Raises `UserError` with the reason."""
    import datasets  # slow to import and seldom needed

    def load() -> Any:
        _check_saved_names(Path(folder))
        dataset = datasets.load_from_disk(folder)
        return dataset["train"] if isinstance(dataset, datasets.DatasetDict) else dataset

    return _asked(folder, load)


class _SavedFile(BaseModel):
    filename: FileName


class _SavedState(BaseModel):
    files: tuple[_SavedFile, ...] = Field(alias="_data_files")


class _SavedSplits(BaseModel):
    splits: tuple[FileName, ...]


def _check_saved_names(folder: Path) -> None:
    """datasets opens whatever file a saved folder names. Raises `UserError` for a name that leads out of it."""
    splits, folders = folder / "dataset_dict.json", [folder]
    if splits.exists():
        folders = [folder / name for name in read_json(_SavedSplits, splits).splits]
    for state in (one / "state.json" for one in folders):
        if state.exists():
            read_json(_SavedState, state)


def saved_columns(folder: str, key: str, start: int, stop: int) -> Iterator[Any]:
    """Arrow columns of about 4 MB with the values of `key` in the rows [start, stop)."""
    dataset = load_saved(folder)
    rows = dataset.select_columns([key]).with_format("arrow")
    step = max(1, min(_BATCH_ROWS, _BATCH_BYTES * len(dataset) // max(int(dataset.data.nbytes), 1)))
    for first in range(start, stop, step):
        yield rows[first : min(first + step, stop)].column(0)


def _asked(name: str, ask: Callable[[], T]) -> T:
    try:
        return ask()
    except UserError:
        raise
    except Exception as error:  # unknown name, config or split, no network, gated: many classes, one remedy
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        wanted = (
            "hf:NAME[:CONFIG][@REVISION] with a split 'train'; check spelling and network, "
            "or download the data and name its folder"
            if name.startswith("hf:")
            else "a folder that `save_to_disk` made, with a split 'train' if it has splits"
        )
        raise UserError(f"cannot load {name} with `datasets`: {reason}\n  wanted {wanted}") from None
