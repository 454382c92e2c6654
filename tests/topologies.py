"""Sentinel trios and six-node clusters of real servers, with the means to break and to heal them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import TypeVar

from tests.servers import Flavour, Server, eventually, free_port

T = TypeVar("T", bound="Topology")


class Sentinel(Server):
    """One sentinel process, which keeps its own configuration file."""

    def __init__(self, flavour: Flavour, service: str, primary_port: int, quorum: int) -> None:
        super().__init__(flavour, tcp=True)
        self.service = service
        self.primary_port = primary_port
        self.quorum = quorum

    def command(self) -> list[str]:
        path = self.folder / "sentinel.conf"
        if not path.exists() or f"port {self.port}\n" not in path.read_text():
            path.write_text(
                f"port {self.port}\nbind 127.0.0.1\ndir {self.folder}\n"
                f"sentinel monitor {self.service} 127.0.0.1 {self.primary_port} {self.quorum}\n"
                f"sentinel down-after-milliseconds {self.service} 800\n"
                f"sentinel failover-timeout {self.service} 3000\n"
                f"sentinel parallel-syncs {self.service} 2\n"
            )
        return [str(self.binary), str(path), "--sentinel"]

    def start(self) -> Sentinel:
        super().start()
        # It asks the servers every ten seconds by default, which is how long it would take to see a change.
        self.cli("SENTINEL", "DEBUG", "INFO-PERIOD", "300", "PING-PERIOD", "200", "PUBLISH-PERIOD", "300")
        return self

    def primary(self) -> int:
        """Port of the primary, in this sentinel's opinion."""
        return int(self.cli("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.service)[1])

    def sees(self, sentinels: int, replicas: int) -> bool:
        """Whether it knows the other sentinels and finds every server of the service well."""
        master = _pairs(self.cli("SENTINEL", "MASTER", self.service))
        nodes = [_pairs(node) for node in self.cli("SENTINEL", "REPLICAS", self.service)]
        up = [node for node in nodes if node["flags"] == "slave" and node["master-link-status"] == "ok"]
        return (
            master["flags"] == "master" and int(master["num-other-sentinels"]) == sentinels - 1 and len(up) == replicas
        )


def _pairs(reply: list[bytes]) -> dict[str, str]:
    words = [word.decode() for word in reply]
    return dict(zip(words[::2], words[1::2], strict=True))


class Topology:
    """Several servers that belong together. `with ... as topology` starts and ends them."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def start(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self._stack.close()

    def __enter__(self: T) -> T:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class SentinelTrio(Topology):
    """A primary, its replicas and three sentinels with a quorum of two."""

    service = "relay-main"

    def __init__(
        self, flavour: Flavour = "redis", *, replicas: int = 1, options: Mapping[str, str] | None = None
    ) -> None:
        super().__init__()
        self.flavour: Flavour = flavour
        self.replicas = replicas
        self.options = dict(options or {})
        self.servers: list[Server] = []
        self.sentinels: list[Sentinel] = []

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"relay+sentinel://{hosts}/{self.service}/0"

    @property
    def primary(self) -> Server:
        """The server that most sentinels call the primary."""
        ports = [sentinel.primary() for sentinel in self.sentinels if sentinel.running]
        port = max(ports, key=ports.count)
        return next(server for server in self.servers if server.port == port)

    def start(self) -> None:
        options = {"repl-diskless-sync-delay": "0"} | self.options
        for _ in range(1 + self.replicas):
            replicating = {"replicaof": f"127.0.0.1 {self.servers[0].port}"} if self.servers else {}
            server = Server(self.flavour, tcp=True, options=options | replicating)
            self.servers.append(self._stack.enter_context(server))
        for server in self.servers[1:]:
            eventually(partial(_in_sync, server), "first sync")
        for _ in range(3):
            sentinel = Sentinel(self.flavour, self.service, self.servers[0].port, quorum=2)
            self.sentinels.append(self._stack.enter_context(sentinel))
        self.wait_until_settled()

    def wait_until_settled(self) -> None:
        """Until all sentinels agree on a primary, and it and its replicas are well."""

        def settled() -> bool:
            ports = {sentinel.primary() for sentinel in self.sentinels}
            return (
                len(ports) == 1
                and self.primary.info("replication")["role"] == "master"
                and all(sentinel.sees(3, self.replicas) for sentinel in self.sentinels)
            )

        eventually(settled, "sentinel trio settles", 60)

    def failover(self) -> Server:
        """A planned failover, as an operator would order it. Returns the new primary once all agree on it."""
        old = self.primary
        # A sentinel answers NOGOODSLAVE until it has seen the replicas' INFO after the last failover.
        eventually(lambda: self.sentinels[0].cli("SENTINEL", "FAILOVER", self.service), "failover starts")
        primary = self.wait_for_primary(other_than=old)
        # until it is a replica, the old one takes writes of connections that are still open, and loses them then
        eventually(lambda: old.info("replication")["role"] == "slave", "the old primary follows", 60)
        return primary

    def kill_primary(self) -> Server:
        """SIGKILL the primary and return it; `wait_for_primary` tells when another has taken over."""
        old = self.primary
        old.kill()
        return old

    def wait_for_primary(self, other_than: Server) -> Server:
        """Until all sentinels name the same other server, and it takes writes."""

        def promoted() -> bool:
            ports = {sentinel.primary() for sentinel in self.sentinels}
            return (
                len(ports) == 1
                and other_than.port not in ports
                and self.primary.info("replication")["role"] == "master"
            )

        eventually(promoted, "another primary takes over", 60)
        return self.primary

    def reset(self) -> None:
        """Start what is down, as replica of the present primary, wait for agreement, and empty it."""
        primary = self.primary
        for server in self.servers:
            if server is primary:
                server.options.pop("replicaof", None)
            else:
                server.options["replicaof"] = f"127.0.0.1 {primary.port}"
            if not server.running:
                server.start()
            server.resume()
        for sentinel in self.sentinels:
            if not sentinel.running:
                sentinel.start()
            sentinel.resume()
        self.wait_until_settled()
        # the next test may kill the primary at once: its replica must have seen that all is gone
        client = self.primary.client()

        def emptied_everywhere() -> bool:
            client.flushall()
            return bool(client.wait(self.replicas, 500) >= self.replicas)

        eventually(emptied_everywhere, "the replicas are empty too")


class Cluster(Topology):
    """Three primaries with a replica each."""

    PRIMARIES = 3
    SLOTS = 16384

    def __init__(self, flavour: Flavour = "valkey", *, options: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.flavour: Flavour = flavour
        own = {
            "cluster-enabled": "yes",
            "cluster-node-timeout": "2000",
            "cluster-replica-validity-factor": "0",
            "repl-diskless-sync-delay": "0",
        }
        self.options = own | dict(options or {})
        self.nodes: list[ClusterNode] = []

    @property
    def url(self) -> str:
        return "relay+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes[:3])

    def start(self) -> None:
        for _ in range(2 * self.PRIMARIES):
            self.nodes.append(self._stack.enter_context(ClusterNode(self.flavour, self.options)))
        first = self.nodes[0]
        for i, node in enumerate(self.nodes[: self.PRIMARIES]):
            low, high = (self.SLOTS * n // self.PRIMARIES for n in (i, i + 1))
            node.cli("CLUSTER", "ADDSLOTSRANGE", str(low), str(high - 1))
            node.cli("CLUSTER", "SET-CONFIG-EPOCH", str(i + 1))
        for node in self.nodes[1:]:
            first.cli("CLUSTER", "MEET", "127.0.0.1", str(node.port), str(node.bus))
        for primary, replica in zip(self.nodes, self.nodes[self.PRIMARIES :], strict=False):
            name = primary.cli("CLUSTER", "MYID")
            # Refused until gossip has told the replica of that primary.
            eventually(partial(replica.cli, "CLUSTER", "REPLICATE", name), "replica joins")
        self.wait_until_ok()

    def wait_until_ok(self) -> None:
        """Until every running node finds the cluster ok, all slots served and all replicas in sync and known."""

        def ok() -> bool:
            ports = {node.port for node in self._up()}
            return all(self._is_well(node, ports) for node in self._up())

        eventually(ok, "cluster is ok", 60)

    def _is_well(self, node: Server, ports: set[int]) -> bool:
        state = dict(line.split(":", 1) for line in node.cli("CLUSTER", "INFO").decode().split())
        return (
            _in_sync(node)
            and state["cluster_state"] == "ok"
            and int(state["cluster_known_nodes"]) == len(self.nodes)
            and int(state["cluster_slots_ok"]) == self.SLOTS
            and {int(at[1]) for _low, _high, *nodes in node.cli("CLUSTER", "SLOTS") for at in nodes} == ports
        )

    def _ranges(self, node: Server) -> list[tuple[int, int, int]]:
        """First slot, last slot and port of the primary, in the opinion of this node."""
        return [(int(low), int(high), int(at[1])) for low, high, at, *_ in node.cli("CLUSTER", "SLOTS")]

    def primary_of(self, slot: int) -> Server:
        """The node that serves the slot, in the opinion of the first running node."""
        witness = next(node for node in self.nodes if node.running)
        port = next(port for low, high, port in self._ranges(witness) if low <= slot <= high)
        return next(node for node in self.nodes if node.port == port)

    def slot_of(self, key: str | bytes) -> int:
        return int(next(node for node in self.nodes if node.running).cli("CLUSTER", "KEYSLOT", key))

    def begin_move(self, slot: int) -> tuple[Server, Server]:
        """Begin a migration of the slot, with all keys that it has: its owner, and the node that it goes to."""
        source = self.primary_of(slot)
        target = next(
            node for node in self.nodes if node is not source and node.info("replication")["role"] == "master"
        )
        target.cli("CLUSTER", "SETSLOT", slot, "IMPORTING", source.cli("CLUSTER", "MYID"))
        source.cli("CLUSTER", "SETSLOT", slot, "MIGRATING", target.cli("CLUSTER", "MYID"))
        names = source.cli("CLUSTER", "GETKEYSINSLOT", slot, 100)
        source.cli("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *names)
        return source, target

    def hand_over(self, slot: int, source: Server, target: Server) -> None:
        """End a migration of the slot, and wait until every node knows: with its new owner's epoch too, as a node
        that missed one would claim a slot anew with an epoch of no more weight, and be overruled."""
        name = target.cli("CLUSTER", "MYID")
        for node in (target, source):
            node.cli("CLUSTER", "SETSLOT", str(slot), "NODE", name)

        def epoch(node: Server) -> bytes:
            lines = [line.split() for line in node.cli("CLUSTER", "NODES").splitlines()]
            return bytes(next(words[6] for words in lines if words[0] == name))

        def agreed() -> bool:
            owners = {port for node in self._up() for low, high, port in self._ranges(node) if low <= slot <= high}
            return owners == {target.port} and len({epoch(node) for node in self._up()}) == 1

        eventually(agreed, "every node knows the slot's owner")

    def kill_primary_of(self, slot: int) -> Server:
        """SIGKILL the node that serves the slot and return it; see `wait_until_replaced`."""
        node = self.primary_of(slot)
        node.kill()
        return node

    def wait_until_replaced(self, dead: Server) -> None:
        """Until no running node takes the killed node for a primary, and all is well without it."""
        eventually(lambda: all(self._has_forgotten(node, dead) for node in self._up()), "replica takes over")
        self.wait_until_ok()

    def _has_forgotten(self, node: Server, dead: Server) -> bool:
        return all(port != dead.port for _low, _high, port in self._ranges(node))

    def _up(self) -> list[Server]:
        return [node for node in self.nodes if node.running]

    def reset(self) -> None:
        """Start what is down, wait until the cluster is ok, and empty it."""
        for node in self.nodes:
            if not node.running:
                node.start()
            node.resume()
        self.wait_until_ok()
        for node in self.nodes:
            if node.info("replication")["role"] == "master":
                node.cli("FLUSHALL")


class ClusterNode(Server):
    """A cluster node, whose bus has a free port of its own."""

    def __init__(self, flavour: Flavour, options: Mapping[str, str]) -> None:
        super().__init__(flavour, tcp=True, options=options)
        self.bus = 0

    def pick_ports(self) -> None:
        super().pick_ports()
        self.bus = free_port()

    def settings(self) -> dict[str, str]:
        return super().settings() | {"cluster-port": str(self.bus)}


def _in_sync(server: Server) -> bool:
    replication = server.info("replication")
    return replication["role"] == "master" or replication["master_link_status"] == "up"
