"""The compose check sees what is wrong with a container; without an engine, from what containers are known to say."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from compose_check import CheckFailedError, Deployment, rights, routes

STATUS = {"Uid": "10001\t10001\t10001\t10001", "CapPrm": "0", "CapEff": "0", "CapBnd": "0", "NoNewPrivs": "1"}
MOUNTS = "overlay / overlay {},relatime,lowerdir=/a 0 0\ntmpfs /tmp tmpfs rw,nosuid 0 0"
HEADING = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
INSIDE = "eth0\t000012AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n"
OUT = "eth0\t00000000\t010012AC\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
LOOPBACK6 = f"{'0' * 32} 00 {'0' * 32} 00 {'0' * 32} ffffffff 00000001 00000000 00200200       lo\n"
OUT6 = f"{'0' * 32} 00 {'0' * 32} 00 fe80{'0' * 27}1 00000400 00000001 00000000 00000003     eth0\n"


class Container(Deployment):
    """One that has these files."""

    def __init__(self, files: dict[str, str]) -> None:
        self._files = files

    def ask(self, service: str, *argv: str) -> str:
        assert service == "worker"
        return next(text for path, text in self._files.items() if path in argv[-1])


def asked_for_rights(mode: str = "ro", **changes: str) -> dict[str, Any]:
    status = "\n".join(f"{name}:\t{value}" for name, value in (STATUS | changes).items())
    return rights(Container({"/proc/1/status": status, "/proc/1/mounts": MOUNTS.format(mode)}), "worker")


def test_a_container_without_rights_passes() -> None:
    assert asked_for_rights() == {
        "user": 10001,
        "capabilities": [0, 0, 0],
        "no_new_privileges": True,
        "root": "ro",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"Uid": "0\t0\t0\t0"}, "runs as root"),
        ({"CapBnd": "00000000a80425fb"}, "has capabilities"),
        ({"NoNewPrivs": "0"}, "may gain privileges"),
        ({"mode": "rw"}, "may write to its root"),
    ],
)
def test_a_right_too_many_is_named(changes: dict[str, str], message: str) -> None:
    with pytest.raises(CheckFailedError, match=message):
        asked_for_rights(**changes)


@pytest.mark.parametrize(
    ("table", "table6", "message"),
    [
        (INSIDE, LOOPBACK6, None),
        (INSIDE, "", None),
        (OUT + INSIDE, "", "default route: "),
        (INSIDE, LOOPBACK6 + OUT6, "default route for IPv6"),
    ],
)
def test_a_way_out_is_seen(table: str, table6: str, message: str | None) -> None:
    container = Container({"/proc/net/route": HEADING + table, "/proc/net/ipv6_route": table6})
    if message is None:
        assert routes(container, "worker")["default_routes"] == 0
    else:
        with pytest.raises(CheckFailedError, match=message):
            routes(container, "worker")
