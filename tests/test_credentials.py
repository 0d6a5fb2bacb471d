"""Secrets in addresses: masked wherever something is shown or stored."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from pipeline.config import Config, resolved
from pipeline.credentials import is_masked, mask, masked
from pipeline.errors import UserError, verdict
from pipeline.train.saving.storage import locate
from tests.support import run_pretrain, tiny_settings, write_config

ADDRESSES = {
    "s3://user:SECRET@bucket/run": "s3://***@bucket/run",
    "s3://AKIA123:SE/CR+ET@bucket/run": "s3://***@bucket/run",
    "s3://user:SEC@RET@bucket": "s3://***@bucket",
    "https://SECRET@host:8080/a": "https://***@host:8080/a",
    "gs+https://u:SECRET@[::1]:80/a": "gs+https://***@[::1]:80/a",
    "https://host/a?X-Amz-Signature=SECRET&versionId=SECRET#t=SECRET": (
        "https://host/a?X-Amz-Signature=***&versionId=***#t=***"
    ),
    "abfs://container@account.dfs.core.windows.net/a?sig=SECRET": "abfs://container@account.dfs.core.windows.net/a?sig=***",
}
HARMLESS = (
    "s3://bucket/run@2/part?.txt",
    "https://host:8080/path@2",
    "http://[::1]:8080/x@y",
    "dask://host:8786",
    "a@b.c: no address",
    "runs/a=b?c=d",
)


@pytest.mark.parametrize("address", ADDRESSES)
def test_credentials_of_an_address_are_masked(address: str) -> None:
    assert (
        mask(f"cannot read {address}, twice '{address}'")
        == f"cannot read {ADDRESSES[address]}, twice '{ADDRESSES[address]}'"
    )
    assert masked({"a": [address, 1], "b": (address,)}) == {"a": [ADDRESSES[address], 1], "b": (ADDRESSES[address],)}
    assert is_masked(ADDRESSES[address])
    assert not is_masked(address)
    assert mask(ADDRESSES[address]) == ADDRESSES[address], "masking twice changes nothing"


@pytest.mark.parametrize("text", HARMLESS)
def test_other_text_stays(text: str) -> None:
    assert mask(text) == text
    assert not is_masked(text)


def test_settings_and_messages_hold_no_credentials() -> None:
    config = Config.model_validate({"checkpoint": {"folder": "s3://user:SECRET@bucket/run"}})
    assert resolved(config)["checkpoint"]["folder"] == "s3://***@bucket/run"
    assert config.checkpoint.folder == "s3://user:SECRET@bucket/run", "the run itself needs them"
    for error in (
        UserError("no s3://u:SECRET@b"),
        OSError(5, "no s3://u:SECRET@b"),
        OSError(5, "no", "s3://u:SECRET@b"),
    ):
        assert "SECRET" not in verdict(error)[1]


def test_a_masked_address_says_what_it_lacks() -> None:
    with pytest.raises(UserError, match="credentials are not stored"):
        locate("s3://***@bucket/run")


def test_nothing_that_a_run_writes_or_prints_holds_credentials(dataset: Path, tmp_path: Path) -> None:
    folder = f"memory://user:SECRET@bucket{tmp_path}?token=SECRET"
    settings = tiny_settings(dataset, tmp_path / "run", train={"steps": 4}, checkpoint={"folder": folder})
    code, printed = run_pretrain(write_config(tmp_path / "c.yaml", settings), "--log.trackers", "tensorboard")
    assert code == 0, printed
    assert "SECRET" not in printed
    assert "***@bucket" in printed
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or b"SECRET" not in path.read_bytes(), path
    starts = json.loads((tmp_path / "run" / "environment.json").read_text())["starts"]
    assert len(starts) == 1


def test_a_long_text_is_looked_through_once() -> None:
    text = "a" * 200_000
    began = time.process_time()
    assert mask(f"{text} s3://user:SECRET@b {text}s3://user:SECRET@b") == f"{text} s3://***@b {text}s3://***@b"
    assert time.process_time() - began < 5  # from each letter on it would take a minute
