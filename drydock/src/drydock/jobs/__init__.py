"""Jobs that are never lost: the truth about a job is a row in PostgreSQL, and the broker is only a doorbell.

How a job moves (each arrow is one conditional statement, by the database's clock):

    accept ──▶ queued ──claim──▶ running ──finishing──▶ done | failed
                 ▲                 │ │
                 ├────── defer ────┘ │ lease ran out (worker killed, frozen or cut off)
                 └────── reap ───────┴──▶ dead, when its attempts are used up

- `engine.accept` inserts the row in the transaction of the job's cause: both are committed, or neither.
- `relay.Relay` (the `relay` command, a service of its own; several may run) rings for jobs that are due: it publishes
  their ids, and publishes them again, with backoff, until a worker has claimed them. A flushed or restarted broker
  loses bells, not jobs.
- `tasks.run` (Celery) claims the job of a bell under a lease, keeps the lease while it works, and hands the job to its
  kind.
- `engine.finishing` commits the effect and the end of the job together, fenced by `attempt`: whoever lost the lease
  cannot commit any more.
- The relay also reaps: a job whose lease ran out is queued again, or is `dead` once its attempts are used up; and it
  prunes finished jobs, so nothing may refer to a job by a foreign key.

To use it in another Django project: add the app to INSTALLED_APPS, put `Kind`s into a `kinds.py` of any app (they are
found at start-up), run `manage.py relay` beside the Celery workers, and let a database router create the app's tables
on every database that a kind names (a job lives where its effect is committed).
Settings: `JOBS_KEPT_FOR_EACH_QUEUE` (default 200 done and 200 failed).
"""
