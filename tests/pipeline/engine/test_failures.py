"""Errors of others become ours: their words without the passwords in them."""

import pytest

from pipeline.engine.failures import InternalFailure, deliberate, hide_secrets


def test_what_a_url_carries_before_its_host_is_hidden():
    text = "cannot reach postgresql+asyncpg://prefect:hunter22@db:5432/prefect or s3://bucket/folder, asked a@b.example"
    assert hide_secrets(text) == (
        "cannot reach postgresql+asyncpg://***@db:5432/prefect or s3://bucket/folder, asked a@b.example"
    )


def test_the_values_of_secret_variables_are_hidden(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "wsss:hunter22")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abc/def+ghi")
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", "postgresql+asyncpg://prefect:letmein9@db/prefect")
    text = "wsss:hunter22 | hunter22 | abc/def+ghi | letmein9 | prefect"
    assert hide_secrets(text) == "*** | *** | *** | *** | prefect"


def test_a_value_that_is_no_secret_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", "sqlite+aiosqlite:////srv/prefect.db")
    monkeypatch.setenv("SOME_TOKEN", "a")
    assert hide_secrets("a database at /srv/prefect.db") == "a database at /srv/prefect.db"


def test_an_unforeseen_error_shows_no_password(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "wsss:hunter22")
    words = "401 for wsss:hunter22 at https://wsss:hunter22@head/api"
    failure = deliberate(RuntimeError(words), "make_masks")
    assert isinstance(failure, InternalFailure)
    assert failure.message == "make_masks failed: RuntimeError: 401 for *** at https://***@head/api"
    assert failure.trace == "RuntimeError: 401 for *** at https://***@head/api\n"
