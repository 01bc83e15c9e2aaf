"""Conditional writes to S3: 412 says that another was first, 409 that one is on its way; both end well."""

from __future__ import annotations

import io

import pytest
from botocore.awsrequest import AWSResponse

from models.errors import StageFailed, UsageError
from tasks import bucket
from tasks.bucket import Bucket


class Raw(io.BytesIO):
    """The body of an answer, as urllib3 gives it."""

    def stream(self, **_):
        yield self.read()


def answering(blobs, code, times):
    """The bucket, whose next `times` writes the server answers with an error; returns the list of writes."""
    seen = []

    def answer(request, **_):
        seen.append(request.headers.get("If-None-Match"))
        if len(seen) > times:
            return None  # the real server's turn
        body = f"<Error><Code>{code[1]}</Code><Message>told so</Message></Error>".encode()
        return AWSResponse(request.url, int(code[0]), {}, Raw(body))

    blobs.client.meta.events.register("before-send.s3.PutObject", answer)
    return seen


@pytest.fixture
def blobs(s3, monkeypatch):
    monkeypatch.setattr(bucket.time, "sleep", lambda seconds: None)
    return Bucket(f"{s3}/some/prefix")


def test_a_conflict_is_tried_again_until_the_server_knows(blobs):
    seen = answering(blobs, bucket.CONFLICT, 3)
    assert blobs.create("manifest.json", b"mine")
    assert len(seen) == 4 and {bytes(one) if isinstance(one, bytes) else one for one in seen} <= {"*", b"*"}
    assert blobs.read("manifest.json") == b"mine"


def test_a_conflict_that_another_has_won_is_done(blobs):
    Bucket(blobs.root).create("manifest.json", b"theirs")
    seen = answering(blobs, bucket.CONFLICT, 2)
    assert blobs.create("manifest.json", b"mine") is None and len(seen) == 3
    assert blobs.read("manifest.json") == b"theirs"


def test_taken_is_taken_at_once(blobs):
    seen = answering(blobs, bucket.TAKEN, 9)
    assert blobs.create("manifest.json", b"mine") is None and len(seen) == 1


def test_a_name_that_stays_busy_is_given_up(blobs):
    answering(blobs, bucket.CONFLICT, 99)
    with pytest.raises(StageFailed, match="stays busy"):
        blobs.create("manifest.json", b"mine")


def test_any_other_answer_is_the_users_to_mend(blobs):
    answering(blobs, ("403", "AccessDenied"), 99)
    with pytest.raises(UsageError, match="AccessDenied"):
        blobs.create("manifest.json", b"mine")
