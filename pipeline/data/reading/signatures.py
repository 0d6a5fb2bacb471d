"""What a file is by its first bytes, where it is nothing that the readers can read.

In: the beginning of a file, unpacked if it is compressed. Out: what the file is and what to do about it, in words, or
None for text and for anything unknown.
"""

from __future__ import annotations

import re
import tarfile
from codecs import getincrementaldecoder

HEAD_BYTES = 4096
"""The most of a file that is looked at."""
NO_TEXT = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")
"""Control characters that text does not hold: all but white space and escape."""

_UNPACK = "unpack it"
_CONVERT = "convert it to parquet or JSON lines"
_EXTRACT = "extract its text first"
_BINARY = (
    (rb"PK(?:\x03\x04|\x05\x06|\x07\x08)", "a zip archive (or a document in one)", "unpack it with `unzip`"),
    (rb"\xfd7zXZ\0", "compressed with xz", "unpack it with `xz -d`"),
    (rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)", "compressed with bzip2", "unpack it with `bzip2 -d`"),
    (rb"\x5d\0\0.{2}\xff{8}|\x5d\0\0[\x80\x00].{2}", "compressed with lzma", "unpack it with `xz -d`"),
    (rb"LZIP", "compressed with lzip", _UNPACK),
    (rb"\x04\x22M\x18|\x02\x21L\x18", "compressed with lz4", "unpack it with `lz4 -d`"),
    (rb"\xff\x06\0\0sNaPpY", "compressed with snappy", _UNPACK),
    (rb"\x1f[\x9d\xa0]", "compressed with compress", _UNPACK),
    (rb"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it with `7z x`"),
    (rb"Rar!\x1a\x07", "a RAR archive", "unpack it with `unrar x`"),
    (rb"(?:ARROW1|FEA1)", "an Arrow file", f"{_CONVERT} with pyarrow"),
    (rb"\xff{4}....\x10\0\0\0", "an Arrow stream", f"name the folder of `save_to_disk` that holds it, or {_CONVERT}"),
    (rb"ORC", "an ORC file", f"{_CONVERT} with pyarrow"),
    (rb"Obj\x01", "an Avro file", _CONVERT),
    (rb"\x89HDF\r\n", "an HDF5 file", _CONVERT),
    (rb"SQLite format 3\0", "an SQLite database", _CONVERT),
    (rb"\x93NUMPY", "a NumPy array", _CONVERT),
    (rb"\x80[\x02-\x05].", "a Python pickle", _CONVERT),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a Microsoft Office document", _EXTRACT),
    (rb"\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a|II\*\0|MM\0\*|RIFF....(?:WEBP|WAVE|AVI )|ID3|OggS|fLaC|....ftyp",
     "an image, a sound or a film", "leave it out"),
    (rb"\x7fELF|MZ.\0|\xca\xfe\xba\xbe|\xcf\xfa\xed\xfe|\0asm", "a compiled program", "leave it out"),
)  # fmt: skip
"""First bytes of files that hold control characters as well: text may begin with "ORC", too."""
_TEXTUAL = (
    (rb"%PDF-\d", "a PDF document", f"{_EXTRACT}, for instance with `pdftotext`"),
    (rb"version https://git-lfs\.github\.com/", "a pointer of Git LFS, not the file itself",
     "fetch the file with `git lfs pull`"),
    (rb"WARC/\d\.\d\r?\n", "a web archive (WARC)", "extract its texts to JSON lines first"),
)  # fmt: skip
_BYTE_ORDER_MARKS = (
    (b"\xff\xfe\0\0", "UTF-32LE"),
    (b"\0\0\xfe\xff", "UTF-32BE"),
    (b"\xff\xfe", "UTF-16LE"),
    (b"\xfe\xff", "UTF-16BE"),
)


def unreadable(head: bytes) -> tuple[str, str] | None:
    """What a file that begins so is, and the remedy; None where it may be text."""
    if encoding := wide_encoding(head):
        return f"text in {encoding}", f"convert it with `iconv -f {encoding} -t UTF-8`"
    for pattern, what, remedy in _TEXTUAL:
        if re.match(pattern, head):
            return what, remedy
    if is_clean(head):
        return None
    if _is_tar(head):
        return "a tar archive", "unpack it with `tar -xf`"
    for pattern, what, remedy in _BINARY:
        if re.match(pattern, head, re.DOTALL):
            return what, remedy
    return None


def is_clean(head: bytes) -> bool:
    """Whether a beginning of a file is UTF-8 without control characters; its last character may be cut."""
    try:
        getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return not NO_TEXT.search(head)


def wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32, told by a byte order mark, or by zeros at every second byte or at three bytes of four.

    Without a mark, only scripts below U+2000 are told, by their spaces and line ends: every text has zeros there.
    """
    for mark, encoding in _BYTE_ORDER_MARKS:
        if head.startswith(mark):
            return encoding
    whole = head[: len(head) // 4 * 4]
    if len(whole) >= 8:
        first, *_, last = columns = [whole[at::4] for at in range(4)]
        zeros = [column.count(0) / len(column) for column in columns]
        if zeros[3] == 1 and zeros[2] > 0.9 and zeros[0] < 0.1 and any(first):
            return "UTF-32LE"
        if zeros[0] == 1 and zeros[1] > 0.9 and zeros[3] < 0.1 and any(last):
            return "UTF-32BE"
    pairs = len(head) // 2
    if pairs >= 2:
        for high, encoding in ((head[1 : 2 * pairs : 2], "UTF-16LE"), (head[0 : 2 * pairs : 2], "UTF-16BE")):
            low = head[0 : 2 * pairs : 2] if encoding == "UTF-16LE" else head[1 : 2 * pairs : 2]
            below = sum(high.count(block) for block in range(0x20)) / pairs
            if high.count(0) >= max(0.1 * pairs, 2) and below > 0.9 and low.count(0) <= 0.02 * pairs:
                return encoding
    return None


def _is_tar(head: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(head[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True
