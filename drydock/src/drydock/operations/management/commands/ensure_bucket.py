"""`drydock ensure_bucket`: create the bucket if it is missing."""

from typing import Any

from botocore.exceptions import BotoCoreError, ClientError
from django.core.management.base import BaseCommand, CommandError

from drydock import config, storage


class Command(BaseCommand):
    """Create the bucket of S3_BUCKET; a second run changes nothing."""

    help = "Create the bucket for PDFs and exports. Prints `changed …` or `unchanged …`."
    requires_system_checks = ()

    def handle(self, *_: Any, **__: Any) -> None:
        """Create what is missing."""
        bucket = config.load().s3_bucket
        try:
            if storage.bucket_exists():
                self.stdout.write(f"unchanged {bucket}")
                return
            storage.create_bucket()
        except (BotoCoreError, ClientError) as error:
            raise CommandError(
                f"bucket {bucket} could not be ensured: {error}. Check S3_ENDPOINT and S3_ACCESS_KEY_ID."
            ) from error
        self.stdout.write(f"changed {bucket}")
