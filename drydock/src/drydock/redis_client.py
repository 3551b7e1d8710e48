"""How Redis is reached, by Celery and by our own client: one server, or the master that the Sentinels name.

Sentinels are asked anew for every connection. So whoever loses the master finds the next one by connecting again, as
Celery and redis-py's pools do.
"""

import ssl
from functools import lru_cache
from typing import Any
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import Sentinel

from drydock import config
from drydock.config import Config

# A Sentinel answers at once or is gone, and there are others to ask.
SENTINEL_TIMEOUT_SECONDS = 1


@lru_cache(maxsize=1)
def client() -> Any:
    """Return this process's Redis client, safe to share between threads.

    Untyped: redis-py's own types mix its synchronous and its asynchronous answers.
    """
    settings = config.load()
    options = {
        **_credentials(settings),
        "db": settings.redis.database,
        "socket_connect_timeout": 2,
        "socket_timeout": 2,
        "health_check_interval": 10,
    }
    if not settings.redis.master:
        host, port = settings.redis.hosts[0]
        return redis.Redis(host, port, **options)
    sentinels = Sentinel(settings.redis.hosts, **_sentinel_options(settings), **options)
    return sentinels.master_for(settings.redis.master)


def celery_url(settings: Config) -> str:
    """Return Celery's broker URL. The password is in it: that is the only way Celery takes one."""
    address = settings.redis
    scheme = "sentinel" if address.master else "rediss" if address.tls else "redis"
    who = f"{quote(address.user, safe='')}:{quote(settings.redis_password, safe='')}"
    return ";".join(f"{scheme}://{who}@{host}:{port}/{address.database}" for host, port in address.hosts)


def celery_sentinel_options(settings: Config) -> dict[str, Any]:
    """Return the options of Celery's transport that are about Sentinels."""
    if not settings.redis.master:
        return {}
    return {"master_name": settings.redis.master, **_sentinel_options(settings)}


def tls(settings: Config) -> dict[str, Any]:
    """Return how a server's certificate is checked; empty without TLS."""
    if not settings.redis.tls:
        return {}
    return {
        "ssl_cert_reqs": ssl.CERT_REQUIRED,
        "ssl_ca_certs": settings.redis_ca_file or ssl.get_default_verify_paths().cafile,
        "ssl_check_hostname": True,
    }


def _credentials(settings: Config) -> dict[str, Any]:
    return {
        "username": settings.redis.user or None,
        "password": settings.redis_password,
        # Our callers have a time limit and say what is missing; silent retries would only hide it.
        "retry": Retry(NoBackoff(), 0),
        **({"ssl": True} if settings.redis.tls else {}),
        **tls(settings),
    }


def _sentinel_options(settings: Config) -> dict[str, Any]:
    return {
        # One that knows no other Sentinel has just been set up, and may know nothing else.
        "min_other_sentinels": min(1, len(settings.redis.hosts) - 1),
        "sentinel_kwargs": {
            **_credentials(settings),
            "socket_connect_timeout": SENTINEL_TIMEOUT_SECONDS,
            "socket_timeout": SENTINEL_TIMEOUT_SECONDS,
        },
    }
