"""Gunicorn's settings: `gunicorn -c python:drydock.gunicorn_conf drydock.wsgi:application`.

It binds to the sockets that systemd passes (LISTEN_FDS), else to --bind. The module is read before anything starts, so
an incomplete environment ends here with one line for each missing variable.
"""

from drydock.config import load

load()

worker_class = "gthread"
workers = 2
threads = 8
timeout = 60
# Longer than the proxy's, so that the proxy never sends a request into a closing connection.
keepalive = 65
graceful_timeout = 30
control_socket_disable = True
# Recycle a worker now and then, not all at once.
max_requests = 10000
max_requests_jitter = 1000

accesslog = "-"
# Without the query string; the address is the one that the proxy saw.
access_log_format = "%(m)s %(U)s status=%(s)s seconds=%(L)s bytes=%(B)s client=%({x-forwarded-for}i)s"
logconfig_dict = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"()": "drydock.logs.LineFormatter"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"level": "INFO", "handlers": ["stderr"]},
    "loggers": {
        "gunicorn.error": {"level": "INFO", "handlers": [], "propagate": True},
        "gunicorn.access": {"level": "INFO", "handlers": [], "propagate": True},
    },
}
