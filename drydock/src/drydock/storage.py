"""Object storage: the one S3 bucket that PDFs and exports live in."""

from functools import lru_cache
from typing import Any

import boto3
from botocore.config import Config as ClientConfig
from botocore.exceptions import ClientError

from drydock import config, storage_errors


@lru_cache(maxsize=2)
def client(timeout_seconds: int = 10, attempts: int = 3) -> Any:
    """Return this process's client; boto3's clients are safe to share between threads."""
    settings = config.load()
    made = boto3.client(
        "s3",
        endpoint_url=settings.s3_endpoint,
        aws_access_key_id=settings.s3_access_key_id,
        aws_secret_access_key=settings.s3_secret_access_key,
        region_name="us-east-1",
        verify=settings.s3_ca_file or True,
        config=ClientConfig(
            signature_version="s3v4",
            s3={"addressing_style": "path"},
            connect_timeout=min(2, timeout_seconds),
            read_timeout=timeout_seconds,
            retries={"total_max_attempts": attempts, "mode": "standard"},
            # Not every S3 endpoint knows the newer checksum trailers; our own sha256 is kept in the database.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )
    storage_errors.watch(made)
    return made


def put(key: str, body: Any, *, content_type: str, sha256: str) -> None:
    """Store one object (bytes or a seekable file)."""
    client().put_object(
        Bucket=config.load().s3_bucket, Key=key, Body=body, ContentType=content_type, Metadata={"sha256": sha256}
    )


def get(key: str) -> Any:
    """Open one object for reading (a stream with `iter_chunks`)."""
    return storage_errors.watch_body(client().get_object(Bucket=config.load().s3_bucket, Key=key)["Body"])


def delete(key: str) -> None:
    """Remove one object; one that is not there is no error."""
    client().delete_object(Bucket=config.load().s3_bucket, Key=key)


def bucket_exists(s3: Any | None = None) -> bool:
    """Say whether the configured bucket is there; an endpoint that fails otherwise raises."""
    try:
        (s3 or client()).head_bucket(Bucket=config.load().s3_bucket)
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
            return False
        raise
    return True


def create_bucket() -> None:
    """Create the configured bucket."""
    client().create_bucket(Bucket=config.load().s3_bucket)
