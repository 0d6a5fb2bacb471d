"""Documents deleted by bitmaps, for one reason or another, without rewriting a shard.

In: a complete dataset and the documents that one reason deletes. Out: the same dataset without them. Reasons are
independent: each has its own bitmap beside the shard, and `NAME.keep-DIGEST.npy` is what all of them leave.

Files bear the digest of their content, and the manifest names them. So the order is: new bitmaps, manifest, removal of
bitmaps that no manifest names any more. Killed anywhere, the folder opens as it was before or as it is after, and
what is superfluous goes the next time. A reader never meets a bitmap with another content than its manifest says.
The caller holds the lock of the folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from pipeline.data.manifest import (
    BitmapKind,
    Counts,
    FileInfo,
    Manifest,
    ShardInfo,
    SplitName,
    data_digest,
    write_manifest,
)
from pipeline.data.shards import Shard, describe_content, keep_bytes
from pipeline.errors import UserError
from pipeline.files import fsync_folder, write_durably

Reason = Literal["duplicates", "contaminated"]
REASONS: tuple[Reason, ...] = get_args(Reason)
Bits = npt.NDArray[np.bool_]


def delete_documents(
    folder: Path, manifest: Manifest, *, reason: Reason, deleted: Mapping[str, Bits], record: Mapping[str, Any]
) -> Manifest:
    """Delete for `reason` what `deleted` says, by name of the shard (documents,), and nothing else for that reason.

    `record` are the keys of the manifest that tell of it. Returns the new manifest, which is written last. Raises
    `UserError` when a split would be left without documents; then nothing is changed.
    """
    contents: dict[str, bytes] = {}
    splits: dict[SplitName, tuple[ShardInfo, ...]] = {}
    for split, old in manifest.splits.items():
        infos = []
        for info in old:
            changed_info, bitmaps = _with_bitmaps(
                open_shard(folder, info, dtype=manifest.dtype), reason, deleted.get(info.name)
            )
            infos.append(changed_info)
            contents |= bitmaps
        if infos and all(info.documents == info.deleted.documents for info in infos):
            raise UserError(
                f"nothing of {split} would be left: all its documents ({sum(info.documents for info in infos):,}) are "
                f"{' or '.join(REASONS)}; the dataset stays as it was"
            )
        splits[split] = tuple(infos)
    for name, content in contents.items():
        write_durably(folder / name, content)
    fsync_folder(folder)
    digest = data_digest(splits, tokenizer_fingerprint=manifest.tokenizer_fingerprint, dtype=manifest.dtype)
    changed = manifest.model_copy(update={"splits": splits, "data_digest": digest, **record})
    write_manifest(folder, changed)
    _remove_unnamed(folder, changed)
    return changed


def open_shard(folder: Path, info: ShardInfo, *, dtype: str) -> Shard:
    """One shard, for work that touches one after the other: what it maps is let go of with it. It knows no sources."""
    return Shard(folder, info, dtype=np.dtype(dtype).newbyteorder("<"), inputs=())


def counts(shard: Shard, chosen: Bits) -> Counts:
    """How much the chosen documents (documents,) of a shard are."""
    if not chosen.any():
        return Counts()
    return Counts(
        documents=int(chosen.sum()),
        tokens=int(shard.lengths[chosen].sum(dtype=np.int64)),
        text_bytes=int(shard.documents["text_bytes"][chosen].sum(dtype=np.int64)),
    )


def kept_by_reasons(shard: Shard) -> Bits:
    """(documents,) what no reason deletes: what `keep` has to be."""
    kept = np.ones(shard.n_documents, np.bool_)
    for reason in REASONS:
        bitmap = shard.bitmap(reason)
        kept &= True if bitmap is None else bitmap
    return kept


def _with_bitmaps(shard: Shard, reason: Reason, deleted: Bits | None) -> tuple[ShardInfo, dict[str, bytes]]:
    """The entry of a shard in which `deleted` are deleted for `reason`, and the content of its bitmaps by file name."""
    stays: dict[BitmapKind, Bits | None] = {other: shard.bitmap(other) for other in REASONS}
    stays[reason] = None if deleted is None or not deleted.any() else ~deleted
    bitmaps = {kind: bitmap for kind, bitmap in stays.items() if bitmap is not None}
    keep = np.logical_and.reduce([*bitmaps.values(), np.ones(shard.n_documents, np.bool_)])
    if bitmaps:
        bitmaps["keep"] = keep
    own = {name: info for name, info in shard.info.files.items() if not _PATTERN.search(name)}
    contents: dict[str, bytes] = {}
    files: dict[str, FileInfo] = {}
    for kind, bitmap in bitmaps.items():
        content = keep_bytes(bitmap)
        described = describe_content(content)
        name = f"{shard.info.name}.{kind}-{described.checksum[:16]}.npy"
        contents[name], files[name] = content, described
    return shard.info.model_copy(update={"files": own | files, "deleted": counts(shard, ~keep)}), contents


_PATTERN = re.compile(rf"\.({'|'.join(get_args(BitmapKind))})-[0-9a-f]{{16}}\.npy(\.tmp)?$")


def _remove_unnamed(folder: Path, manifest: Manifest) -> None:
    """Remove bitmaps of other manifests, and what a killed process left of writing them."""
    named = {name for infos in manifest.splits.values() for info in infos for name in info.files}
    for path in sorted(folder.iterdir()):
        if _PATTERN.search(path.name) and path.name not in named:
            path.unlink(missing_ok=True)
