"""Filters that compute, from an inventory's groups, what several roles must agree on: who is where, on which port."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

try:
    from ansible.errors import AnsibleFilterError
except ImportError:  # imported by a tool that has no Ansible

    class AnsibleFilterError(Exception):  # type: ignore[no-redef]
        """Stands in for Ansible's error class."""


#: Groups that a platform cannot do without, and what each is for.
GROUPS = {
    "etcd": "the quorum store that decides which PostgreSQL member is primary",
    "postgresql_core": "the members of PostgreSQL cluster core",
    "postgresql_plugins": "the members of PostgreSQL cluster plugins",
    "redis": "the message broker",
    "web": "the web processes",
    "worker": "the worker processes",
    "proxy": "the reverse proxy that users reach",
    "backup": "the repository host of the backups",
}

#: TCP ports by service. `postgresql-<cluster>-rest` is Patroni's API; all but `proxy-http` speak TLS.
PORTS = {
    "etcd": 2379,
    "etcd-peer": 2380,
    "etcd-metrics": 2381,
    "postgresql-core": 5432,
    "postgresql-plugins": 5433,
    "postgresql-core-rest": 8008,
    "postgresql-plugins-rest": 8009,
    "redis": 6379,
    "redis-sentinel": 26379,
    "object-storage": 9000,
    "backup-repository": 8432,
    "backup-agent": 8433,
    "proxy": 443,
    "proxy-http": 80,
}

CLUSTERS = ("core", "plugins")


#: Groups whose members decide by majority, and what an even or too small number of them costs.
VOTERS = {"etcd": "etcd decides which PostgreSQL member is primary", "redis": "the Sentinels beside Redis decide which member is master"}

#: How soon libpq gives up: connecting to one host (s), data that nobody acknowledges (ms), silence (s). The kernel would wait for minutes.
LIBPQ_PATIENCE = "connect_timeout=2&tcp_user_timeout=3000&keepalives_idle=5&keepalives_interval=2&keepalives_count=3"

#: The name under which hosts of the platform reach its front door, wherever that is at the moment.
FRONT_DOOR = "platform"


def topology(
    groups: Mapping[str, Sequence[str]],
    addresses: Mapping[str, str],
    ports: Mapping[str, int] | None = None,
    front_door: str = "",
    s3_url: str = "",
) -> dict[str, Any]:
    """Who is where.

    groups: the inventory's groups (host names). addresses: IP address of each host. ports: TCP ports that differ from `PORTS`.
    front_door: the IP address that moves between the proxies; needed from two proxies. s3_url: an S3 endpoint that is not ours.

    Returns {addresses, ports, etcd, postgresql: {cluster: …}, redis, object_storage, backup, web, worker, proxy, platform}; each
    service is {members: [{name, address}], port} (PostgreSQL also rest_port, Redis sentinel_port, object storage url), platform is
    {name, address}. Raises AnsibleFilterError with one sentence for a group that is missing or empty, a number of voters that has no
    majority without one of them, a second repository host, a host without an address, an address used twice, proxies without a
    common address, and an unknown service in `ports`.
    """
    unknown = sorted(set(ports or {}) - set(PORTS))
    if unknown:
        raise AnsibleFilterError(f"platform_ports names unknown services: {', '.join(unknown)}. Known are: {', '.join(PORTS)}")
    for group, purpose in GROUPS.items():
        if not groups.get(group):
            raise AnsibleFilterError(
                f"inventory group '{group}' ({purpose}) has no host: add at least one under 'children: {group}: hosts:' in the inventory"
            )
    for group, purpose in VOTERS.items():
        count = len(groups[group])
        if count % 2 == 0:
            raise AnsibleFilterError(
                f"inventory group '{group}' has {count} hosts, but {purpose}, by majority: {count} are no safer than {count - 1}. "
                f"Make them {count + 1}{'' if count == 2 else f' or {count - 1}'}, or 1 where a loss may stop the platform"
            )
    if len(groups["backup"]) > 1:
        raise AnsibleFilterError(
            f"inventory group 'backup' has {len(groups['backup'])} hosts ({', '.join(groups['backup'])}), but one drives all backups; the "
            "second copy goes to S3: leave one"
        )
    owner: dict[str, str] = {}
    for host in groups["all"]:
        address = addresses.get(host)
        if not address:
            raise AnsibleFilterError(f"host '{host}' has no address: set 'ansible_host: <IP address>' for it in the inventory")
        if address in owner:
            raise AnsibleFilterError(f"hosts '{owner[address]}' and '{host}' have the same address {address} in the inventory")
        owner[address] = host
    if len(groups["proxy"]) > 1 and not front_door:
        raise AnsibleFilterError(
            f"inventory group 'proxy' has {len(groups['proxy'])} hosts, but platform_address is not set: give the platform an address "
            "of the proxies' network that no host has; it moves to a proxy that works"
        )
    if front_door in owner and len(groups["proxy"]) > 1:
        raise AnsibleFilterError(f"platform_address {front_door} is the address of host '{owner[front_door]}': it needs one of its own")
    port = {**PORTS, **(ports or {})}

    def members(group: str) -> list[dict[str, str]]:
        return [{"name": host, "address": addresses[host]} for host in groups.get(group, [])]

    return {
        "services": ["etcd", *[f"postgresql-{cluster}" for cluster in CLUSTERS], "redis", "object-storage", "proxy"],
        "addresses": {host: addresses[host] for host in groups["all"]},
        "ports": port,
        "etcd": {"members": members("etcd"), "port": port["etcd"]},
        "postgresql": {
            cluster: {
                "members": members(f"postgresql_{cluster}"),
                "port": port[f"postgresql-{cluster}"],
                "rest_port": port[f"postgresql-{cluster}-rest"],
            }
            for cluster in CLUSTERS
        },
        "redis": {"members": members("redis"), "port": port["redis"], "sentinel_port": port["redis-sentinel"]},
        "object_storage": {
            "members": members("object_storage"),
            "port": port["object-storage"],
            "url": s3_url or "".join(f"https://{host}:{port['object-storage']}" for host in groups.get("object_storage", [])[:1]),
        },
        "backup": {"members": members("backup"), "port": port["backup-repository"]},
        "web": {"members": members("web")},
        "worker": {"members": members("worker")},
        "proxy": {"members": members("proxy"), "port": port["proxy"]},
        "platform": {"name": FRONT_DOOR, "address": front_door or members("proxy")[0]["address"]},
    }


def database_hosts(topo: Mapping[str, Any]) -> list[str]:
    """The hosts that carry a member of any PostgreSQL cluster, each once."""
    return list(dict.fromkeys(member["name"] for place in topo["postgresql"].values() for member in place["members"]))


def libpq_url(service: Mapping[str, Any], user: str, database: str, ca_file: str) -> str:
    """A libpq connection URL without password that names every member and asks for the primary, over verified TLS.

    A client with it leaves a host that has gone within about three seconds, and a connection that hears nothing within about ten.
    """
    hosts = ",".join(f"{member['name']}:{service['port']}" for member in service["members"])
    tls = f"sslmode=verify-full&sslrootcert={ca_file}"
    return f"postgresql://{user}@{hosts}/{database}?target_session_attrs=read-write&{tls}&{LIBPQ_PATIENCE}"


def redis_url(service: Mapping[str, Any], user: str, database: int = 0) -> str:
    """A Redis URL without password, over TLS: of the one member or, where there are several, of the Sentinels that know the master.

    With Sentinels its form is rediss+sentinel://user@host:port,host:port/master/database; the master is called `main`.
    """
    if len(service["members"]) == 1:
        return f"rediss://{user}@{service['members'][0]['name']}:{service['port']}/{database}"
    hosts = ",".join(f"{member['name']}:{service['sentinel_port']}" for member in service["members"])
    return f"rediss+sentinel://{user}@{hosts}/main/{database}"


def endpoints(topo: Mapping[str, Any], app: Mapping[str, Any], groups: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Every listening endpoint of the platform: [{host, service, port}], infrastructure first, then the application's web processes.

    Raises AnsibleFilterError when two services would listen on one port of one host.
    """
    of_group = {
        "etcd": ["etcd", "etcd-peer", "etcd-metrics"],
        "redis": ["redis", "redis-sentinel"] if len(groups["redis"]) > 1 else ["redis"],
        "object_storage": ["object-storage"],
        "proxy": ["proxy", "proxy-http"],
        "backup": ["backup-repository"],
        **{f"postgresql_{cluster}": [f"postgresql-{cluster}", f"postgresql-{cluster}-rest"] for cluster in CLUSTERS},
    }
    table: list[dict[str, Any]] = [
        {"host": host, "service": service, "port": int(topo["ports"][service])}
        for group, services in of_group.items()
        for host in groups.get(group, [])
        for service in services
    ]
    table += [{"host": host, "service": "backup-agent", "port": int(topo["ports"]["backup-agent"])} for host in database_hosts(topo)]
    table += [
        {"host": host, "service": f"{app['name']}-{name}", "port": int(process["port"])}
        for name, process in app["processes"].items()
        if process.get("port")
        for host in groups.get(process["hosts"], [])
    ]
    taken: dict[tuple[str, int], str] = {}
    for row in table:
        place = (row["host"], row["port"])
        if place in taken:
            raise AnsibleFilterError(
                f"port conflict on host '{row['host']}': {taken[place]} and {row['service']} both want TCP port {row['port']}. "
                f"Change one in platform_ports or in app.processes.<name>.port"
            )
        taken[place] = row["service"]
    return table


def platform_health_services(
    topo: Mapping[str, Any], host: str, contract: Mapping[str, Any], pki_dir: str, virtual_address: str = ""
) -> list[dict[str, Any]]:
    """Entries of `healthcheck_services` for a host: what runs there, and (`remote`) what its processes wait for elsewhere (H3).

    contract: the normalised app contract. The application's own rows come from `contract_health_services`.
    virtual_address: the address that the proxies share, empty when they share none.

    A row of this host is about its own member: a standby is healthy when it accepts connections. A remote row is about the service,
    and any member may answer for it: for PostgreSQL and Redis the one that takes writes.
    """
    ca = f"{pki_dir}/ca.crt"
    database = next(iter(contract["databases"].values()), {"name": "postgres", "owner": "postgres"})

    def redis_cli(address: str, port: int, *words: str) -> dict[str, Any]:
        command = ["redis-cli", "-e", "--tls", "--cacert", ca, "-h", address, "-p", str(port), "--user", "health", *words]
        return {"kind": "command", "command": command, "credentials": {"REDISCLI_AUTH": "redis-health"}, "protocol": "Redis, TLS"}

    def local(name: str, address: str, port: int) -> dict[str, Any]:
        if name == "etcd":
            url = f"http://127.0.0.1:{topo['ports']['etcd-metrics']}/health"
            return {"unit": "etcd.service", "kind": "http", "url": url, "contains": '"health":"true"', "protocol": "gRPC, TLS"}
        if name == "redis":
            return {"unit": "redis-server.service", **redis_cli(address, port, "PING"), "expected": "PONG"}
        if name == "redis-sentinel":
            return {"unit": "redis-sentinel.service", **redis_cli(address, port, "PING"), "expected": "PONG"}
        if name == "object-storage":
            url = f"https://{address}:{port}/"  # unsigned, so it is refused
            return {"unit": "object-storage.service", "kind": "http", "url": url, "ca": ca, "status": 400, "protocol": "https (S3)"}
        if name in ("backup-repository", "backup-agent"):  # asking pgBackRest would cost more than all other checks together
            return {"unit": f"{name}.service", "kind": "unit", "protocol": "pgBackRest, TLS"}
        if name == "proxy":
            return {"unit": "nginx.service", "kind": "http", "url": f"https://{address}:{port}/nginx-health", "ca": ca, "protocol": "https"}
        if name == "keepalived":  # wherever the address is, it answers from here
            url = f"https://{virtual_address}:{port}/nginx-health"
            return {"unit": "keepalived.service", "kind": "http", "url": url, "ca": ca, "protocol": "https"}
        cluster = name.removeprefix("postgresql-")
        owned = contract["databases"].get(cluster, database)
        command = ["/usr/lib/postgresql/15/bin/pg_isready", "-h", address, "-p", str(port), "-U", owned["owner"], "-d", owned["name"]]
        return {"unit": f"patroni@{cluster}.service", "kind": "command", "command": command, "protocol": "PostgreSQL, TLS"}

    def remote(name: str, address: str, port: int) -> dict[str, Any]:
        if name == "redis":
            asked = redis_cli(address, port, "--csv", "ROLE")
            return {**local(name, address, port), **asked, "expected": '"master",', "packages": ["redis-tools"]}
        if name.startswith("postgresql-"):
            cluster = name.removeprefix("postgresql-")
            url = f"https://{address}:{topo['postgresql'][cluster]['rest_port']}/primary"
            return {"unit": f"patroni@{cluster}.service", "kind": "http", "url": url, "ca": ca, "protocol": "PostgreSQL, TLS"}
        return local(name, address, port)

    places = {
        "etcd": topo["etcd"],
        **{f"postgresql-{cluster}": topo["postgresql"][cluster] for cluster in CLUSTERS},
        "redis": topo["redis"],
        "redis-sentinel": {
            "members": topo["redis"]["members"] if len(topo["redis"]["members"]) > 1 else [],
            "port": topo["redis"]["sentinel_port"],
        },
        "object-storage": topo["object_storage"],
        "backup-repository": topo["backup"],
        "backup-agent": {
            "members": [{"name": name} for name in database_hosts(topo)],
            "port": topo["ports"]["backup-agent"],
        },
        "proxy": topo["proxy"],
        "keepalived": {**topo["proxy"], "members": topo["proxy"]["members"] if virtual_address else []},
    }
    wanted = {name for process in contract["processes"].values() if host in process["members"] for name in process["after"]}
    services: list[dict[str, Any]] = []
    for name, place in places.items():
        port, members = place["port"], place["members"]
        service: dict[str, Any] = {"name": name, "owner": "platform"}
        if host in [member["name"] for member in members]:
            address = virtual_address if name == "keepalived" else topo["addresses"][host]
            services.append({**service, "endpoint": f"{address}:{port}", **local(name, address, port)})
        elif name in wanted and members:
            rows = [remote(name, member["address"], port) for member in members]
            place_to_ask = "url" if rows[0]["kind"] == "http" else "command"
            others = [{place_to_ask: row[place_to_ask]} for row in rows[1:]]
            service = {**service, "endpoint": f"{members[0]['address']}:{port}", "remote": True, **rows[0]}
            services.append({**service, "alternatives": others} if others else service)
        elif name in wanted and name == "object-storage" and place["url"]:  # not ours: that it answers is all that it tells strangers
            command = ["curl", "--silent", "--show-error", "--output", "/dev/null", place["url"]]
            asked = {"kind": "command", "command": command, "endpoint": place["url"], "protocol": "https (S3)"}
            services.append({**service, **asked, "remote": True})
    for name, timers in clock_timers(topo, host).items():
        services.append({"name": name, "owner": "platform", "kind": "timer", "timers": timers})
    return services


def clock_timers(topo: Mapping[str, Any], host: str) -> dict[str, list[str]]:
    """What the clock starts on a host for the databases, by the name under which its health is told."""
    timers: dict[str, list[str]] = {}
    for cluster, place in topo["postgresql"].items():
        if host in [member["name"] for member in topo["backup"]["members"]]:
            timers[f"backup-{cluster}"] = [f"backup-{kind}@{cluster}.timer" for kind in ("full", "diff", "incr")]
            timers[f"restore-drill-{cluster}"] = [f"restore-drill@{cluster}.timer"]
        if host in [member["name"] for member in place["members"]]:
            timers[f"archive-{cluster}"] = [f"archive-watch@{cluster}.timer"]
            timers[f"pg-maintenance-{cluster}"] = [f"pg-maintenance-{action}@{cluster}.timer" for action in ("vacuum", "reindex")]
    return timers


def empty_secrets(secrets: Mapping[str, Any]) -> list[str]:
    """The names of secrets that have no value."""
    return sorted(name for name, value in secrets.items() if not str(value or "").strip())


def problem_of(function: Callable[..., Any]) -> Callable[..., str]:
    """The same function, telling what is wrong with its input in one sentence; empty when nothing is."""

    def told(*arguments: Any) -> str:
        try:
            function(*arguments)
        except AnsibleFilterError as error:
            return str(error)
        return ""

    return told


class FilterModule:
    """Filters of the platform's topology."""

    def filters(self) -> dict[str, Any]:
        return {
            "topology": topology,
            "topology_problem": problem_of(topology),
            "endpoints": endpoints,
            "endpoints_problem": problem_of(endpoints),
            "libpq_url": libpq_url,
            "redis_url": redis_url,
            "database_hosts": database_hosts,
            "empty_secrets": empty_secrets,
            "platform_health_services": platform_health_services,
        }
