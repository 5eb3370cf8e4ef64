"""A real S3 server on loopback, for tests."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from moto.server import ThreadedMotoServer

from cdpo_ray.store import place

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@contextmanager
def serve() -> Iterator[Path]:
    """An empty bucket; processes started in the block find it by the environment."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    try:
        with patch.dict(os.environ, CREDENTIALS | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}):
            bucket = place("s3://bucket")
            bucket.fs.clear_instance_cache()  # or one that knows another endpoint
            bucket = place("s3://bucket")
            bucket.fs.mkdir("bucket")
            yield bucket
    finally:
        server.stop()
