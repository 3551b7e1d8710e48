"""The script processor: a service of its own that runs scripts (exports) for the workers, as OMERO's does.

    export worker ──POST /runs──▶ drydock processor ──own session──▶ drydock run_script export
         ▲  ◀──GET /runs/<id>──         ▲                                      │
         │                              └──────── job file on tmpfs ◀──────────┤
         └───────────── reads back and verifies ── object storage ◀────────────┘

- `client`   what workers and the health check use: the standard library only, so that it starts in milliseconds
- `runs`     the slots, and the process of each run, which ends with its time limit, its job or its processor
- `server`   the HTTP side: logins, the list of scripts, runs
- `scripts`  the registry; an app's module `scripts` registers what it has
- `models`   which scripts are registered, and which processors are alive

A processor knows nothing of jobs, leases and attempts: it runs what it is asked to, and the worker that holds the job
decides what becomes of the result.
"""
