"""Django's and Celery's settings. What differs between installations comes from the environment (`config.py`)."""

from typing import Any

from kombu import Exchange, Queue

from drydock import config, redis_client

CONFIG = config.load()

SECRET_KEY = CONFIG.secret_key
DEBUG = False
ALLOWED_HOSTS = CONFIG.allowed_hosts
ROOT_URLCONF = "drydock.urls"
WSGI_APPLICATION = "drydock.wsgi.application"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
LANGUAGE_CODE = "en"
TIME_ZONE = "UTC"
USE_TZ = True

INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.staticfiles",
    "drydock.accounts",
    "drydock.jobs",
    "drydock.documents",
    "drydock.exports",
    "drydock.processor",
    "drydock.learning",
    "drydock.uploads",
    "drydock.operations",
]
MIDDLEWARE = [
    "drydock.middleware.RequestIdentity",
    "django.middleware.security.SecurityMiddleware",
    "drydock.middleware.ContentSecurityPolicy",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "drydock.middleware.DatabaseAway",
    "drydock.uploads.middleware.TemporaryFiles",
    "drydock.uploads.middleware.StorageAway",
    "django.middleware.csrf.CsrfViewMiddleware",
    "drydock.middleware.Authentication",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
TEMPLATES: list[dict[str, Any]] = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
            ]
        },
    }
]

# --- Databases -------------------------------------------------------------------------------------------------------
# `default` is only another name for `core`: what does not name a database means core.
DATABASES = CONFIG.databases | {"default": CONFIG.databases["core"] | {"TEST": {"MIRROR": "core"}}}
DATABASE_ROUTERS = ["drydock.routers.ClusterRouter"]

# --- Accounts --------------------------------------------------------------------------------------------------------
AUTH_USER_MODEL = "accounts.User"
LOGIN_URL = "login"
LOGIN_REDIRECT_URL = "dashboard"
LOGOUT_REDIRECT_URL = "login"
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": "django.contrib.auth.password_validation.MinimumLengthValidator", "OPTIONS": {"min_length": 12}},
    {"NAME": "django.contrib.auth.password_validation.CommonPasswordValidator"},
]

# --- Security: TLS ends at the proxy, which sets X-Forwarded-Proto and is the only one that reaches our port ---------
SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")
SECURE_HSTS_SECONDS = CONFIG.hsts_seconds
SECURE_REFERRER_POLICY = "same-origin"
SESSION_COOKIE_SECURE = True
SESSION_COOKIE_HTTPONLY = True
SESSION_COOKIE_AGE = 12 * 3600
CSRF_COOKIE_SECURE = True
CSRF_TRUSTED_ORIGINS = CONFIG.csrf_trusted_origins
CSRF_FAILURE_VIEW = "drydock.operations.errors.csrf_failure"
X_FRAME_OPTIONS = "DENY"
DATA_UPLOAD_MAX_MEMORY_SIZE = 2 * 1024 * 1024
FILE_UPLOAD_HANDLERS = ["drydock.uploads.handlers.LockedFileHandler"]
SILENCED_SYSTEM_CHECKS = [
    "security.W004",  # HSTS is the operator's decision: DRYDOCK_HSTS_SECONDS
    "security.W005",  # … and so are its subdomains
    "security.W008",  # the proxy redirects to HTTPS; health checks on the host speak plain HTTP
    "security.W021",  # … and the browsers' preload list
]

# --- Static files: served by WhiteNoise straight from the installed package ------------------------------------------
STATIC_URL = "/static/"
WHITENOISE_USE_FINDERS = True
WHITENOISE_AUTOREFRESH = False

# --- Logs: one structured line for each event, on stderr, for the journal ---------------------------------------------
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"()": "drydock.logs.LineFormatter"}},
    "filters": {"pings": {"()": "drydock.logs.QuietPings"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line", "filters": ["pings"]}},
    "root": {"level": "INFO", "handlers": ["stderr"]},
    "loggers": {"django": {"level": "INFO", "handlers": [], "propagate": True}},
}

# --- Jobs and Celery -------------------------------------------------------------------------------------------------
QUEUES = ("latex.compile", "export")
# What a compile may need beside the engine's own time: read the source, store the PDF, apply the result.
LATEX_TASK_TIME_LIMIT_SECONDS = CONFIG.latex_compile_timeout_seconds + 30
EXPORT_TIME_LIMIT_SECONDS = CONFIG.export_time_limit_seconds

CELERY_BROKER_URL = redis_client.celery_url(CONFIG)
if CONFIG.redis.tls:
    CELERY_BROKER_USE_SSL = redis_client.tls(CONFIG)
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
# A master that lost its replicas or its office refuses commands: that is no reason for a worker to end.
CELERY_BROKER_CHANNEL_ERROR_RETRY = True
CELERY_BROKER_TRANSPORT_OPTIONS = {
    # Longer than any task with its drain, or a running task would be handed out a second time.
    "visibility_timeout": int(max(LATEX_TASK_TIME_LIMIT_SECONDS, EXPORT_TIME_LIMIT_SECONDS)) + 300,
    # Without these a dead broker is noticed after minutes.
    "socket_timeout": 3,
    "socket_connect_timeout": 2,
    "socket_keepalive": True,
    "health_check_interval": 10,
    # Pings overtake waiting jobs.
    "queue_order_strategy": "priority",
    **redis_client.celery_sentinel_options(CONFIG),
}
CELERY_TASK_QUEUES = [Queue(name, Exchange("drydock"), routing_key=name) for name in QUEUES]
CELERY_TASK_DEFAULT_QUEUE = "export"
CELERY_TASK_CREATE_MISSING_QUEUES = False  # a mistyped queue is an error, not a queue that nobody reads
CELERY_TASK_DEFAULT_PRIORITY = 3  # on Redis 0 comes first: pings
CELERY_TASK_ACKS_LATE = True  # a busy worker keeps no bell that an idle one could answer
CELERY_TASK_REJECT_ON_WORKER_LOST = True  # a bell of a killed worker rings again; its job's attempts are capped
CELERY_TASK_ACKS_ON_FAILURE_OR_TIMEOUT = True  # what became of a job stands in its row, not in the broker
# Beside its queue a worker reads one of its own, `<name>@<host>.dq2`, by which its health is asked for.
CELERY_WORKER_DIRECT = True
CELERY_WORKER_PREFETCH_MULTIPLIER = 1  # take no bell that another worker could answer now
CELERY_TASK_IGNORE_RESULT = True  # results live in the job table
# A worker that loses the broker goes on with the job in hand: its lease is in PostgreSQL, and a bell that is handed
# out again finds the job claimed.
CELERY_WORKER_CANCEL_LONG_RUNNING_TASKS_ON_CONNECTION_LOSS = False
CELERY_WORKER_HIJACK_ROOT_LOGGER = False
